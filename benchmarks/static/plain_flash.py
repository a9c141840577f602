"""A plain flash attention (Dao 2023), forward and backward: what our inner loops are compared with.

Dense and causal, one key and value tensor, as many key as query heads and tokens; tokens a multiple of the tiles. No
prefix and no option. With s_ij = scale · q_i·k_j for j <= i:

    out_i = Σ_j e^{s_ij - lse_i} v_j      δ_i = do_i·out_i      ds_ij = e^{s_ij - lse_i} (do_i·v_j - δ_i)
    dq_i = scale Σ_j ds_ij k_j            dv_j = Σ_i e^{s_ij - lse_i} do_i       dk_j = scale Σ_i ds_ij q_i

All tensors are [B, H, T, D] with a contiguous last dim and the same strides; lse, base 2, and δ are float32 [B, H, T].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_fast.backends.triton_config import Tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offset(stride_b, stride_h, heads):
    """Elements before the row and head of this program."""
    pair = tl.program_id(1)
    return (pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h


@triton.jit
def _rows(base, stride, tile, dims, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = base + tile[:, None] * stride + dims[None, :]
    return tl.load(pointers) if D == BLOCK_D else tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _attend(
    output, maximum, total, q, low, high, queries, dims, key, value, stride, scale,
    DIAGONAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.arange(0, BLOCK_K)
    for start in range(low, high, BLOCK_K):
        first = tl.cast(start, tl.int64) * stride
        k = _rows(key + first, stride, tile, dims, D, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if DIAGONAL:
            product = tl.where((start + tile)[None, :] <= queries[:, None], product, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(product, 1) * (scale * LOG2E))
        weights = tl.exp2(product * (scale * LOG2E) - new_maximum[:, None])
        factor = tl.exp2(maximum - new_maximum)
        total = total * factor + tl.sum(weights, 1)
        maximum = new_maximum
        v = _rows(value + first, stride, tile, dims, D, BLOCK_D)
        output = tl.dot(weights.to(q.dtype), v, output * factor[:, None], input_precision=PRECISION)
    return output, maximum, total


@triton.jit(do_not_specialize=["heads", "tokens"])
def forward_kernel(
    query, key, value, out, lse, stride_b, stride_h, stride_t, heads, tokens, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (T / BLOCK_Q, B · H)."""
    first_query = tl.program_id(0) * BLOCK_Q
    tile = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    offset = _offset(stride_b, stride_h, heads)
    own = offset + tl.cast(first_query, tl.int64) * stride_t
    q = _rows(query + own, stride_t, tile, dims, D, BLOCK_D)
    output = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    queries = first_query + tile
    full = first_query // BLOCK_K * BLOCK_K
    output, maximum, total = _attend(
        output, maximum, total, q, 0, full, queries, dims, key + offset, value + offset, stride_t, scale,
        False, D, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    output, maximum, total = _attend(
        output, maximum, total, q, full, first_query + BLOCK_Q, queries, dims, key + offset, value + offset, stride_t,
        scale, True, D, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    pointers = out + own + tile[:, None] * stride_t + dims[None, :]
    output = output / total[:, None]
    tl.store(pointers, output.to(out.dtype.element_ty), mask=(dims < D)[None, :])
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + queries, maximum + tl.log2(total))


@triton.jit
def _descend(
    dq, q, do, level, delta, low, high, queries, dims, key, value, stride, scale,
    DIAGONAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.arange(0, BLOCK_K)
    for start in range(low, high, BLOCK_K):
        first = tl.cast(start, tl.int64) * stride
        k = _rows(key + first, stride, tile, dims, D, BLOCK_D)
        v = _rows(value + first, stride, tile, dims, D, BLOCK_D)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) - level[:, None])
        if DIAGONAL:
            weights = tl.where((start + tile)[None, :] <= queries[:, None], weights, 0.0)
        ds = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["heads", "tokens"])
def dq_kernel(
    query, key, value, grad_out, lse, deltas, grad_query, stride_b, stride_h, stride_t, heads, tokens, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (T / BLOCK_Q, B · H)."""
    first_query = tl.program_id(0) * BLOCK_Q
    tile = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    offset = _offset(stride_b, stride_h, heads)
    own = offset + tl.cast(first_query, tl.int64) * stride_t
    q = _rows(query + own, stride_t, tile, dims, D, BLOCK_D)
    do = _rows(grad_out + own, stride_t, tile, dims, D, BLOCK_D)
    queries = first_query + tile
    scalars = tl.program_id(1).to(tl.int64) * tokens + queries
    level = tl.load(lse + scalars)
    delta = tl.load(deltas + scalars)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    full = first_query // BLOCK_K * BLOCK_K
    dq = _descend(
        dq, q, do, level, delta, 0, full, queries, dims, key + offset, value + offset, stride_t, scale,
        False, D, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    dq = _descend(
        dq, q, do, level, delta, full, first_query + BLOCK_Q, queries, dims, key + offset, value + offset, stride_t,
        scale, True, D, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    pointers = grad_query + own + tile[:, None] * stride_t + dims[None, :]
    tl.store(pointers, (dq * scale).to(grad_query.dtype.element_ty), mask=(dims < D)[None, :])


@triton.jit
def _gather(
    dk, dv, k, v, low, high, keys, dims, query, grad_out, lse, deltas, stride, scale,
    DIAGONAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.arange(0, BLOCK_Q)
    for start in range(low, high, BLOCK_Q):
        first = tl.cast(start, tl.int64) * stride
        q = _rows(query + first, stride, tile, dims, D, BLOCK_D)
        do = _rows(grad_out + first, stride, tile, dims, D, BLOCK_D)
        level = tl.load(lse + start + tile)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) - level[None, :])
        if DIAGONAL:
            weights = tl.where(keys[:, None] <= (start + tile)[None, :], weights, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = weights * (dp - tl.load(deltas + start + tile)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["heads", "tokens"])
def dkv_kernel(
    query, key, value, grad_out, lse, deltas, grad_key, grad_value, stride_b, stride_h, stride_t, heads, tokens, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (T / BLOCK_K, B · H)."""
    first_key = tl.program_id(0) * BLOCK_K
    tile = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    offset = _offset(stride_b, stride_h, heads)
    own = offset + tl.cast(first_key, tl.int64) * stride_t
    k = _rows(key + own, stride_t, tile, dims, D, BLOCK_D)
    v = _rows(value + own, stride_t, tile, dims, D, BLOCK_D)
    keys = first_key + tile
    scalars = tl.program_id(1).to(tl.int64) * tokens
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    low = first_key // BLOCK_Q * BLOCK_Q
    full = tl.cdiv(first_key + BLOCK_K - 1, BLOCK_Q) * BLOCK_Q
    dk, dv = _gather(
        dk, dv, k, v, low, full, keys, dims, query + offset, grad_out + offset, lse + scalars, deltas + scalars,
        stride_t, scale, True, D, BLOCK_D, BLOCK_Q, PRECISION,
    )  # fmt: skip
    dk, dv = _gather(
        dk, dv, k, v, full, tokens, keys, dims, query + offset, grad_out + offset, lse + scalars, deltas + scalars,
        stride_t, scale, False, D, BLOCK_D, BLOCK_Q, PRECISION,
    )  # fmt: skip
    offsets = own + tile[:, None] * stride_t + dims[None, :]
    tl.store(grad_key + offsets, (dk * scale).to(grad_key.dtype.element_ty), mask=(dims < D)[None, :])
    tl.store(grad_value + offsets, dv.to(grad_value.dtype.element_ty), mask=(dims < D)[None, :])


def attention(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, tile: Tile, precision: str = "ieee"
) -> tuple[Tensor, ...]:
    """out and the gradients of query, key and value, all tensors [B, H, T, D] with the strides of `query`."""
    B, H, T, D = query.shape
    out, grad_query, grad_key, grad_value = (torch.empty_like(query) for _ in range(4))
    lse = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    common = {
        "stride_b": query.stride(0), "stride_h": query.stride(1), "stride_t": query.stride(2), "heads": H, "tokens": T,
        "scale": D**-0.5, "D": D, "BLOCK_D": triton.next_power_of_2(D), "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys,
        "PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    query_grid, key_grid = (T // tile.queries, B * H), (T // tile.keys, B * H)
    forward_kernel[query_grid](query, key, value, out, lse, **common)
    deltas = (out.float() * grad_out.float()).sum(-1)
    dq_kernel[query_grid](query, key, value, grad_out, lse, deltas, grad_query, **common)
    dkv_kernel[key_grid](query, key, value, grad_out, lse, deltas, grad_key, grad_value, **common)
    return out, grad_query, grad_key, grad_value
