"""What a prefix learns (PrefixConfig), and one site's keys and values: direct parameters, or an MLP's output."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefix_fast.geometry import SITES, Geometry, checked_integer, split_flat


@dataclass(frozen=True)
class PrefixConfig:
    """What to learn; names as in PEFT, whose default projection is False where the paper's is True.

    Args:
        num_virtual_tokens: P, the prefix's length; 0 is an empty prefix.
        prefix_projection: learn P[i] = MLP(P'[i]) with tanh (the paper's reparametrisation) instead of the
            keys and values themselves.
        encoder_hidden_size: width of that MLP's hidden layer.
        prefix_dropout: in training, the probability of dropping each number of the keys and values.
        sites: the attentions that read a prefix; None: all of the model's. A decoder-only model has "decoder"
            alone, an encoder-decoder "encoder", "decoder" and "cross", each with keys and values (and MLP) of its own.

    Raises:
        TypeError: a field of another type. ValueError: a field out of range, an unknown or repeated site.
    """

    num_virtual_tokens: int = 10
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    prefix_dropout: float = 0.0
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("num_virtual_tokens", 0), ("encoder_hidden_size", 1)):
            number = checked_integer(getattr(self, name), name, minimum, "PrefixConfig")
            object.__setattr__(self, name, number)
        if not isinstance(self.prefix_projection, bool):
            raise TypeError(
                f"PrefixConfig: expected prefix_projection to be a bool, got {self.prefix_projection!r}; "
                "pass True or False"
            )
        object.__setattr__(self, "prefix_dropout", _checked_dropout(self.prefix_dropout))
        if self.sites is not None:
            object.__setattr__(self, "sites", _checked_sites(self.sites))


def _checked_dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"PrefixConfig: expected prefix_dropout to be a number, got {value!r} ({type(value).__name__}); "
            "pass a probability"
        )
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"PrefixConfig: expected 0 <= prefix_dropout < 1, got {value}; pass a probability, 0 for none")
    return float(value)


def _checked_sites(sites: Any) -> tuple[str, ...]:
    if isinstance(sites, str) or not isinstance(sites, (tuple, list)):
        raise TypeError(f"PrefixConfig: expected sites to be a sequence of names, got {sites!r}; pass ['decoder']")
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites or len(set(sites)) < len(sites):
        raise ValueError(
            f"PrefixConfig: expected sites to be different names of {SITES}, got {tuple(sites)}; leave sites "
            "out for all of the model's"
        )
    return tuple(sites)


class DirectSite(nn.Module):
    """One site's keys and values [L, Hkv, P, D] as the parameters themselves, unscaled.

    Without a start they are drawn as PEFT draws its embedding: N(0, 1), in the order of its layout.
    """

    def __init__(self, config: PrefixConfig, geometry: Geometry, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        if start is None:
            flat = torch.empty(config.num_virtual_tokens, geometry.flat_dim, dtype=torch.float32).normal_()
            start = split_flat(flat, geometry)
        self.keys = nn.Parameter(_float32_copy(start[0]))
        self.values = nn.Parameter(_float32_copy(start[1]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values [L, Hkv, P, D]."""
        return self.keys, self.values


class ReparametrisedSite(nn.Module):
    """One site's keys and values as P[i] = W₂ tanh(W₁ P'[i] + b₁) + b₂, plus a fixed start where one is
    given.

    P' is [P, Hkv · D], the MLP's width `encoder_hidden_size`, its output PEFT's layout [P, L · 2 · Hkv · D].
    Parameters and their names are those of PEFT's PrefixEncoder, drawn in its order; with a start, the last
    layer is zero, so that the prefix begins as the given keys and values.
    """

    base_keys: Tensor | None
    base_values: Tensor | None

    def __init__(self, config: PrefixConfig, geometry: Geometry, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.geometry = geometry
        device = None if start is None else start[0].device
        factory: dict[str, Any] = {"dtype": torch.float32, "device": device}
        hidden = config.encoder_hidden_size
        self.embedding = nn.Embedding(config.num_virtual_tokens, geometry.token_dim, **factory)
        self.transform = nn.Sequential(
            nn.Linear(geometry.token_dim, hidden, **factory),
            nn.Tanh(),
            nn.Linear(hidden, geometry.flat_dim, **factory),
        )
        if start is not None:
            for parameter in self.transform[-1].parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("base_keys", None if start is None else _float32_copy(start[0]))
        self.register_buffer("base_values", None if start is None else _float32_copy(start[1]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values [L, Hkv, P, D]; without a start, views of the MLP's output."""
        keys, values = split_flat(self.transform(self.embedding.weight), self.geometry)
        if self.base_keys is None or self.base_values is None:
            return keys, values
        return self.base_keys + keys, self.base_values + values


def _float32_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
