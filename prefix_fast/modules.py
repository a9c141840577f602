"""Attention with learnt prefixes as a module, for models written by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from prefix_fast.functional import prefix_attention
from prefix_fast.geometry import checked_integer


class PrefixAttention(nn.Module):
    """Attention with learnt prefixes for a hand-written model: the parameters and a call of prefix_attention.

    out[b, h, i] = Σ softmax over the row's prefix and its visible own keys (see
    prefix_fast.prefix_attention). Owns `prefix_key` and `prefix_value` [num_prefixes, num_kv_heads, P, D],
    drawn from N(0, 1).

    Args:
        num_virtual_tokens: P, may be 0.
        num_heads, head_dim: H query heads of D.
        num_kv_heads: Hkv, a divisor of H; None: H.
        num_prefixes: N; with more than one, each call needs `prefix_ids`.

    Raises:
        TypeError: a size is not an integer. ValueError: a size out of range, heads that do not divide.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        num_prefixes: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "PrefixAttention"
        self.num_virtual_tokens = checked_integer(num_virtual_tokens, "num_virtual_tokens", 0, where)
        self.num_heads = checked_integer(num_heads, "num_heads", 1, where)
        self.head_dim = checked_integer(head_dim, "head_dim", 1, where)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = checked_integer(kv_heads, "num_kv_heads", 1, where)
        self.num_prefixes = checked_integer(num_prefixes, "num_prefixes", 1, where)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"PrefixAttention: expected num_heads to be a multiple of num_kv_heads, got {num_heads} and "
                f"{num_kv_heads}; pass a divisor of num_heads"
            )
        shape = (self.num_prefixes, self.num_kv_heads, self.num_virtual_tokens, self.head_dim)
        self.prefix_key = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.prefix_value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw keys and values from N(0, 1)."""
        nn.init.normal_(self.prefix_key)
        nn.init.normal_(self.prefix_value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        """prefix_attention with these prefixes; every keyword of it may be given, shapes and errors are its
        own.

        Args:
            query: [B, num_heads, Tq, D]. key, value: [B, num_kv_heads, Tk, D].

        Raises:
            ValueError: a query with another number of heads.
        """
        if query.dim() == 4 and query.shape[1] != self.num_heads:
            raise ValueError(
                f"PrefixAttention: expected query [B, H, Tq, D] with H={self.num_heads}, got "
                f"{tuple(query.shape)}; make the module with this number of heads"
            )
        return prefix_attention(query, key, value, self.prefix_key, self.prefix_value, **options)

    def extra_repr(self) -> str:
        """What the printed module shows of the prefixes."""
        return (
            f"num_virtual_tokens={self.num_virtual_tokens}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, num_kv_heads={self.num_kv_heads}, num_prefixes={self.num_prefixes}"
        )
