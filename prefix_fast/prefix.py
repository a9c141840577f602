"""The prefix as a module: where it starts, what it gives the attention, folding, and its files."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from prefix_fast import adapters_files, checkpoint, original
from prefix_fast.files import find_folder, upload_folder
from prefix_fast.geometry import (
    SITES,
    Geometry,
    ModelSites,
    check_same_sites,
    model_geometry,
    model_sites,
)
from prefix_fast.initialisation import keys_and_values_from_cache, keys_and_values_from_text
from prefix_fast.parametrisation import DirectSite, PrefixConfig, ReparametrisedSite

__all__ = ["Geometry", "Prefix", "PrefixConfig", "model_geometry"]


class Prefix(nn.Module):
    """A prefix for one model: calling it gives, for each site, keys and values [L, 1, Hkv, P, D].

    The parameters are float32 and stay so: `.to(dtype)`, `.half()` and their like move a Prefix to another
    device but never change its dtype, also as part of a model. Under autocast the reparametrisation's MLP
    runs in its dtype. Read a layer through `keys.unbind(0)`: its backward stacks the layers' gradients once,
    where indexing with `keys[l]` would add L zero-filled tensors of the full size.

    The sites of an encoder-decoder are "encoder", "decoder" and "cross" (the decoder's attention to the encoder's
    states); L is the site's own number of layers. A decoder-only model has "decoder" alone.

    state_dict: `sites.decoder.keys`, `sites.decoder.values` [L, Hkv, P, D]; reparametrised
    `sites.decoder.embedding.weight`, `sites.decoder.transform.{0,2}.{weight,bias}`, and where it started from
    a text the buffers `sites.decoder.base_keys`, `sites.decoder.base_values`.

    Args:
        config: what to learn.
        model_config: the transformers config of the model, its ModelSites, or a decoder-only model's Geometry.
        start: per site the keys and values [L, Hkv, P, D] to begin with; None: at random, as PEFT's
            PrefixEncoder.
        base_model_name: the model's name or path, written beside the saved prefix; None: the config's.
        shifts_positions: the model's own tokens stand after the prefix. False: their positions are those without one,
            as in `adapters`.

    Raises:
        TypeError: config or model_config of another type. ValueError: a start of another shape.
        NotImplementedError: a model without a geometry (see model_geometry), a site that the model lacks.
    """

    def __init__(
        self,
        config: PrefixConfig,
        model_config: Any,
        *,
        start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        base_model_name: str | None = None,
        shifts_positions: bool = True,
    ) -> None:
        super().__init__()
        self.shifts_positions = shifts_positions
        if not isinstance(config, PrefixConfig):
            raise TypeError(
                f"Prefix: expected config to be a PrefixConfig, got {type(config).__name__}; pass "
                "PrefixConfig(num_virtual_tokens=...)"
            )
        self.config = config
        offered = model_sites(model_config)
        self.base_model_name = base_model_name or getattr(model_config, "_name_or_path", None) or None
        missing = [site for site in config.sites or () if site not in offered.geometries]
        if missing:
            kind = "an encoder-decoder" if offered.is_encoder_decoder else "a decoder-only model"
            raise NotImplementedError(
                f"Prefix: expected sites={tuple(offered.geometries)} or a part of it for {kind}, got {config.sites}; it"
                f" has no {' and no '.join(missing)} attention: leave sites out"
            )
        chosen = [site for site in SITES if site in (config.sites or offered.geometries)]
        geometries = {site: offered.geometries[site] for site in chosen}
        self.model_sites = ModelSites(geometries, offered.is_encoder_decoder)
        site_class = ReparametrisedSite if config.prefix_projection else DirectSite
        self.sites = nn.ModuleDict(
            {site: site_class(config, shape, self._start_of(site, start)) for site, shape in geometries.items()}
        )

    def _start_of(self, site: str, start: Mapping[str, tuple[Tensor, Tensor]] | None) -> tuple[Tensor, Tensor] | None:
        if start is None:
            return None
        if site not in start:
            raise ValueError(f"Prefix: expected a start for the site {site!r}, got {sorted(start)}; pass one")
        geometry = self.model_sites.geometries[site]
        shape = (geometry.num_layers, geometry.num_kv_heads, self.num_virtual_tokens, geometry.head_dim)
        for name, tensor in zip(("keys", "values"), start[site], strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"Prefix: expected starting {name} [L, Hkv, P, D] = {shape}, got {tuple(tensor.shape)}; "
                    "start from the same model and length"
                )
        return start[site]

    @property
    def geometry(self) -> Geometry:
        """The decoder's layers, key/value heads and head dim; of a prefix without that site, its first site's."""
        geometries = self.model_sites.geometries
        return geometries.get("decoder") or next(iter(geometries.values()))

    @property
    def num_virtual_tokens(self) -> int:
        """P, the prefix's length."""
        return self.config.num_virtual_tokens

    def forward(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{site: (keys, values)}, each [L, 1, Hkv, P, D] with a contiguous last dim."""
        sites = self._sites()
        return {site: (self._read(keys), self._read(values)) for site, (keys, values) in sites.items()}

    def _sites(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: site() for name, site in self.sites.items()}

    def _read(self, tensor: Tensor) -> Tensor:
        if self.training and self.config.prefix_dropout > 0:
            tensor = dropout(tensor, self.config.prefix_dropout)
        return tensor.unsqueeze(1)

    @torch.no_grad()
    def _folded(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The sites' keys and values in float32, without dropout and whatever autocast is on."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self._sites()

    def fold(self) -> "Prefix":
        """A direct Prefix with copies of the same keys and values."""
        config = replace(self.config, prefix_projection=False)
        kept = {"base_model_name": self.base_model_name, "shifts_positions": self.shifts_positions}
        return Prefix(config, self.model_sites, start=self._folded(), **kept)  # type: ignore[arg-type]

    def check_fits(self, model_config: Any) -> None:
        """Raise ValueError if the model lacks a site of this prefix, or has other layers, heads or head dim there.

        Args:
            model_config: the transformers config of the model, or what else Prefix takes; raises as model_sites
                does.
        """
        check_same_sites(self.model_sites, model_sites(model_config), "Prefix.check_fits")

    @classmethod
    def from_text(cls, model: Any, tokenizer: Any, text: str, config: PrefixConfig | None = None) -> "Prefix":
        """A prefix that starts as the model's own keys and values for the text.

        The rows that read it then see what they would see with the text before them. With `prefix_projection`
        (the default) what is learnt is an MLP added to them, whose last layer starts at zero.

        Args:
            model: a transformers model (also inside a PeftModel), run once in evaluation mode without
                gradients.
            tokenizer: called as `tokenizer(text)["input_ids"]`.
            text: its tokens become the virtual tokens, one for one.
            config: None: a PrefixConfig() with as many virtual tokens as the text has tokens. Otherwise
                `num_virtual_tokens` must be that number: the text is neither cut nor repeated.

        Raises:
            TypeError: text is not a string. ValueError: no tokens, another number of tokens than the
                config's, more tokens than the model has positions. NotImplementedError: as Prefix and
                from_cache.
        """
        model_geometry(model.config)  # refuses a model that no prefix fits before it runs
        wanted = None if config is None else config.num_virtual_tokens
        keys, values = keys_and_values_from_text(model, tokenizer, text, wanted)
        config = config or PrefixConfig(num_virtual_tokens=keys.shape[2])
        return cls(config, model.config, start={"decoder": (keys, values)})

    @classmethod
    def from_cache(cls, past_key_values: Any) -> "Prefix":
        """Any computed key/value cache as a direct prefix: shared system prompts, cartridges.

        Args:
            past_key_values: a transformers DynamicCache or StaticCache (unused slots are dropped), or one
                pair (key, value) [B, Hkv, P, D] per layer; B is 1, or all rows are identical. Copied to
                float32.

        Raises:
            TypeError, ValueError, NotImplementedError: as initialisation.keys_and_values_from_cache.
        """
        keys, values = keys_and_values_from_cache(past_key_values)
        config = PrefixConfig(num_virtual_tokens=keys.shape[2], prefix_projection=False)
        geometry = Geometry(keys.shape[0], keys.shape[1], keys.shape[3])
        return cls(config, geometry, start={"decoder": (keys, values)})

    @classmethod
    def from_original(cls, state_dict: Mapping[str, Tensor], model_config: Any) -> "Prefix":
        """A reparametrised prefix with the weights of the original Prefix-Tuning code, for GPT-2 or BART.

        Args:
            state_dict: its names and tensors, as `torch.load(file, weights_only=True)` gives them; see `original`.
            model_config: as of Prefix.

        Raises:
            ValueError: names, or shapes for another model. NotImplementedError: its deeper MLP; as Prefix.
        """
        config, parameters = original.read(state_dict)
        prefix = cls(config, model_config)
        for name, tensor in prefix.state_dict().items():
            if parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"Prefix.from_original: expected {name!r} of shape {tuple(tensor.shape)} for this model, got"
                    f" {tuple(parameters[name].shape)}; use the model that the prefix was trained for"
                )
        prefix.load_state_dict(parameters)
        return prefix

    @classmethod
    def from_adapters(cls, folder: str | PathLike[str], model_config: Any) -> "Prefix":
        """A direct prefix from the folder in which the library `adapters` saved one; see `adapters_files`.

        Args:
            folder: with adapter_config.json and adapter.safetensors or pytorch_adapter.bin.
            model_config: as of Prefix.

        Raises:
            As adapters_files.read, and as Prefix.
        """
        offered = model_sites(model_config)
        tokens, sites = adapters_files.read(Path(folder), offered)
        chosen = tuple(site for site in SITES if site in sites) if offered.is_encoder_decoder else None
        config = PrefixConfig(tokens, prefix_projection=False, sites=chosen)
        return cls(config, model_config, start=sites, shifts_positions=False)

    def original_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the names of the original code; undoes from_original. See original.written."""
        return original.written(self.state_dict())

    def save_pretrained(self, save_directory: str | PathLike[str], *, format: str = "auto") -> None:
        """Write the folded prefix, as PEFT's own files where PEFT can express it; see checkpoint.save.

        Args:
            save_directory: made if it is not there; an earlier prefix in it is replaced.
            format: "auto", "peft" (raises with the reason where PEFT cannot) or "native".
        """
        stored = checkpoint.StoredPrefix(
            model_sites=self.model_sites,
            sites=self._folded(),
            encoder_hidden_size=self.config.encoder_hidden_size,
            prefix_dropout=self.config.prefix_dropout,
            base_model_name=self.base_model_name,
            shifts_positions=self.shifts_positions,
        )
        checkpoint.save(stored, save_directory, format)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        model_config: Any = None,
        format: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "Prefix":
        """A direct prefix from files that PEFT or save_pretrained wrote; see checkpoint.load.

        Args:
            source: a folder, or a Hub id.
            model_config: if given, the files are checked against this model before any number is read.
            format: "auto", "peft" or "native".
            revision, token, cache_dir, local_files_only: handed to huggingface_hub for a Hub id.
        """
        folder = find_folder(
            source,
            checkpoint.FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        expected = None if model_config is None else model_sites(model_config)
        stored = checkpoint.load(folder, format, expected)
        config = PrefixConfig(
            num_virtual_tokens=stored.num_virtual_tokens,
            prefix_projection=False,
            encoder_hidden_size=stored.encoder_hidden_size,
            prefix_dropout=stored.prefix_dropout,
            sites=tuple(stored.sites) if stored.model_sites.is_encoder_decoder else None,
        )
        kept = {"base_model_name": stored.base_model_name, "shifts_positions": stored.shifts_positions}
        return cls(config, stored.model_sites, start=stored.sites, **kept)  # type: ignore[arg-type]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload prefix",
        format: str = "auto",
    ) -> str:
        """Upload what save_pretrained writes to a Hub repository, made if missing; returns the commit's URL."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, format=format)
            return upload_folder(folder, repo_id, private=private, token=token, commit_message=commit_message)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Prefix":
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Half precision loses small updates; a memory format would break the contiguous last dim.
            kept = moved.dtype == tensor.dtype and moved.stride() == tensor.stride()
            return moved if kept else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def extra_repr(self) -> str:
        """What the printed module shows of the prefix."""
        own = [f"num_virtual_tokens={self.num_virtual_tokens}", f"prefix_projection={self.config.prefix_projection}"]
        sizes = {
            site: ", ".join(f"{k}={v}" for k, v in vars(g).items()) for site, g in self.model_sites.geometries.items()
        }
        if self.model_sites.is_encoder_decoder:
            return ", ".join(own) + "".join(f"\n{site}: {size}" for site, size in sizes.items())
        return ", ".join([*own, sizes["decoder"]])
