"""Ours and its rivals on a GPU: what each computes, in the layout that suits it best.

Masks, packed layouts and caches are made once, outside what is timed. Everything that a step with a learned prefix has
to do again belongs to the timed part: above all the copies of the prefix that a rival needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from prefix_fast import prefix_attention
from prefix_fast.backends.triton_cost import Shape

PAGE = 16  # tokens of a page of FlashInfer's cache
WORKSPACE = 128 * 2**20  # bytes that FlashInfer's planner asks for


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        forward: the output, differentiable where `leaves` are given.
        leaves: query, key, value, prefix key and prefix value as it takes them; empty: it has no backward here.
        plain: of such a tensor, number `index` of the leaves, or of the output (0): its [B, heads, tokens, D] form.
        given: the gradient of the output in this contender's form, from its plain form.
    """

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()
    plain: Callable[[int, Tensor], Tensor] = lambda index, tensor: tensor
    given: Callable[[Tensor], Tensor] = lambda grad_out: grad_out

    def results(self, grad_out: Tensor | None) -> list[Tensor]:
        """The output and, given its gradient in this contender's own form, the gradients of all leaves."""
        if grad_out is None:
            with torch.no_grad():
                return [self.forward()]
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, self.leaves, grad_out)]

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Results in the form that all contenders share."""
        return [self.plain(max(place - 1, 0), tensor) for place, tensor in enumerate(results)]


def make_inputs(shape: Shape, device: str, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """query [B, H, Tq, D], key and value [B, Hkv, Tk, D], prefix key and value [1, Hkv, P, D], as a model has them."""
    generator = torch.Generator("cpu").manual_seed(0)
    B, D = shape.rows, shape.head_dim
    ((_, P),) = shape.sets
    sizes = [(B, shape.queries, shape.heads), *[(B, shape.keys, shape.kv_heads)] * 2, *[(1, P, shape.kv_heads)] * 2]
    rows = [torch.randn(*size, D, generator=generator, device="cpu").to(device, dtype) for size in sizes]
    return [tensor.transpose(1, 2).requires_grad_(grad) for tensor in rows]


def ours(leaves: list[Tensor], backend: str) -> Contender:
    """The operator; the prefix is read in place."""
    return Contender(lambda: prefix_attention(*leaves, backend=backend), leaves)


def concatenated(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values with a copy of the prefix for every row, as PEFT and transformers make them."""
    _, key, value, *prefix = leaves
    copies = [tensor.expand(len(key), -1, -1, -1) for tensor in prefix]
    return torch.cat([copies[0], key], dim=2), torch.cat([copies[1], value], dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    """SDPA by one backend alone, which raises where it cannot; with no mask in memory."""
    Tq, keys = query.shape[2], key.shape[2]
    mask = causal_lower_right(Tq, keys) if Tq > 1 else None
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **grouped)


def concatenation(leaves: list[Tensor], backend: SDPBackend) -> Contender:
    """SDPA over prefixes that are copied for every row in every step."""
    return Contender(lambda: _sdpa(leaves[0], *concatenated(leaves), backend), leaves)


def cached(leaves: list[Tensor], backend: SDPBackend) -> Contender:
    """SDPA over a cache that holds a copy of the prefix for every row already."""
    keys, values = (tensor.detach() for tensor in concatenated(leaves))
    return Contender(lambda: _sdpa(leaves[0], keys, values, backend))


def prefix_mask(P: int, offset: int) -> Callable[..., Tensor]:
    """flex's mask of one row: the prefix, and own keys up to the query, which stands `offset` further on."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + (P + offset)

    return visible


def packed_mask(P: int, tokens: int) -> Callable[..., Tensor]:
    """flex's mask of rows packed one after another behind one prefix: the prefix, and the row's own keys before."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = key - P
        same_row = torch.div(own, tokens, rounding_mode="floor") == torch.div(query, tokens, rounding_mode="floor")
        return (key < P) | (same_row & (own <= query) & (own >= 0))

    return visible


def _block_mask(mask: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> BlockMask:
    return create_block_mask(mask, None, None, queries, keys, device=str(device))


def flex_concatenation(leaves: list[Tensor], flex: Callable[..., Any] = flex_attention) -> Contender:
    """FlexAttention over prefixes that are copied for every row in every step."""
    query, key, _, prefix_key, _ = leaves
    P, Tq, Tk = prefix_key.shape[2], query.shape[2], key.shape[2]
    mask = _block_mask(prefix_mask(P, Tk - Tq), Tq, P + Tk, query.device)
    grouped = query.shape[1] != key.shape[1]
    return Contender(lambda: flex(query, *concatenated(leaves), block_mask=mask, enable_gqa=grouped), leaves)


def pack(tensor: Tensor) -> Tensor:
    """[B, heads, T, D] → [1, heads, B·T, D], lying in memory as a model with packed rows has it."""
    rows, heads, tokens, head_dim = tensor.shape
    return tensor.transpose(1, 2).reshape(1, rows * tokens, heads, head_dim).transpose(1, 2)


def unpack(tensor: Tensor, rows: int) -> Tensor:
    """The inverse of `pack`."""
    return tensor[0].unflatten(1, (rows, -1)).transpose(0, 1)


def packed_flex(leaves: list[Tensor], flex: Callable[..., Any] = flex_attention) -> Contender:
    """FlexAttention over one row: the prefix once, then the tokens of all rows, under a block mask. Tq = Tk."""
    rows, tokens, P = leaves[0].shape[0], leaves[0].shape[2], leaves[3].shape[2]
    packed = [pack(t.detach()).requires_grad_(t.requires_grad) for t in leaves[:3]]
    prefix = [t.detach().requires_grad_(t.requires_grad) for t in leaves[3:]]
    query, key, value = packed
    mask = _block_mask(packed_mask(P, tokens), rows * tokens, P + rows * tokens, query.device)
    grouped = query.shape[1] != key.shape[1]

    def forward() -> Tensor:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(prefix, (key, value), strict=True))
        return flex(query, keys, values, block_mask=mask, enable_gqa=grouped)

    def plain(index: int, tensor: Tensor) -> Tensor:
        return tensor if index > 2 else unpack(tensor, rows)

    return Contender(forward, [*packed, *prefix], plain, pack)


def pages_of(leaves: list[Tensor]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """FlashInfer's paged cache [pages, 2, PAGE, Hkv, D] of the prefix and the rows, and its table for both levels."""
    _, key, value, prefix_key, prefix_value = (tensor.detach() for tensor in leaves)
    pages, tables = [], []
    before = 0
    for keys, values in ((prefix_key, prefix_value), (key, value)):
        count, heads, tokens, head_dim = keys.shape
        each = math.ceil(tokens / PAGE)
        padded = keys.new_zeros(2, count, each * PAGE, heads, head_dim)
        padded[:, :, :tokens] = torch.stack([keys, values]).transpose(2, 3)
        pages.append(padded.view(2, count * each, PAGE, heads, head_dim).transpose(0, 1))
        number = torch.arange(count + 1, dtype=torch.int32, device=keys.device)
        tables.append(
            {
                "indptr": number * each,
                "indices": torch.arange(count * each, dtype=torch.int32, device=keys.device) + before,
                "last": torch.full_like(number[1:], tokens - (each - 1) * PAGE),
            }
        )
        before += count * each
    return torch.cat(pages).contiguous(), tables


def flashinfer_cascade(leaves: list[Tensor]) -> Contender:
    """FlashInfer's two-level cascade, planned before; forward alone.

    Raises:
        ImportError: flashinfer is not installed.
    """
    import flashinfer

    query = leaves[0].detach()
    rows, heads, tokens, head_dim = query.shape
    cache, tables = pages_of(leaves)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * tokens
    wrapper.plan(
        [starts[[0, -1]].contiguous(), starts],
        *([table[name] for table in tables] for name in ("indptr", "indices", "last")),
        heads, leaves[1].shape[1], head_dim, PAGE, causal=True, q_data_type=query.dtype,
    )  # fmt: skip
    packed = query.transpose(1, 2).reshape(rows * tokens, heads, head_dim)
    return Contender(
        lambda: wrapper.run(packed, cache),
        plain=lambda _, out: out.unflatten(0, (rows, tokens)).transpose(1, 2),
    )


def rivals_of(shape: Shape, leaves: list[Tensor]) -> dict[str, Callable[[], Contender]]:
    """How to make each rival of a shape, by name; making one may raise, as a rival has limits of its own.

    The first is no rival: our own CUDA kernels, beside the Triton kernels that are compared with all.
    """
    compiled = torch.compile(flex_attention, dynamic=False)
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rivals = {
        "prefix_attention, CUDA kernels": lambda: ours(leaves, "cuda"),
        "concatenation + SDPA, flash": lambda: concatenation(leaves, flash),
        "concatenation + flex": lambda: flex_concatenation(leaves, compiled),
    }
    if shape.queries == shape.keys:
        return {**rivals, "packed flex": lambda: packed_flex(leaves, compiled)}
    return {
        **rivals,
        "SDPA, flash, concatenated before": lambda: cached(leaves, flash),
        "SDPA, cuDNN, concatenated before": lambda: cached(leaves, cudnn),
        "FlashInfer cascade": lambda: flashinfer_cascade(leaves),
    }
