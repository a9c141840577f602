"""Launches the backward kernels: only those of gradients that are wanted."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefix_fast.backends import triton_short
from prefix_fast.backends.problem import Grads
from prefix_fast.backends.triton_call import SCRATCH_TILE, Call, odd_strides_of, strides_of, unit_tiles
from prefix_fast.backends.triton_config import Tile, Tiles
from prefix_fast.backends.triton_cost import reader_splits
from prefix_fast.backends.triton_partials import add_partials, partials_of


def backward(
    call: Call, tiles: Tiles, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: Grads
) -> None:
    """Write every element of every gradient that is wanted, and compute no other."""
    tiles = call.fitting(tiles)
    scratch = _prepare(call, out, lse, grad_out, grad_lse)
    fused = triton_short.fuses(call, tiles.short, grads)
    query = grads.query
    if query is not None and fused:
        write = triton_short.queries_and_segments
        call.run("short", tiles, lambda tile: write(call, tile, grad_out, scratch, query, *grads.sets[0]))
    elif query is not None:
        call.run("dq", tiles, lambda tile: _queries(call, tile, grad_out, scratch, query))
    for index, (grad_key, grad_value) in enumerate([*grads.sets, (grads.key, grads.value)]):
        computed = fused and index == 0
        if not computed and any(t is not None and t.numel() > 0 for t in (grad_key, grad_value)):
            launch = partial(
                _set, call, index=index, grad_out=grad_out, scratch=scratch, grad_key=grad_key, grad_value=grad_value
            )
            call.run("dkv", tiles, launch)


def _prepare(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Any]:
    """δ and lse of every query, padded to whole tiles."""
    from prefix_fast.kernels.prefix_attention_bwd_dq import prepare_kernel

    packed = call.problem.cu_seqlens_q is not None
    tiles = call.query_tiles(SCRATCH_TILE)
    capacity = out.shape[0] + call.rows * SCRATCH_TILE if packed else tiles * SCRATCH_TILE
    scratch = out.new_empty((2, call.heads, capacity), dtype=torch.float32)
    prepare_kernel[(tiles, call.heads)](
        out, lse, grad_out, grad_lse, call.problem.cu_seqlens_q, scratch[0], scratch[1],
        strides_of(out, packed), odd_strides_of(lse, packed), strides_of(grad_out, packed),
        odd_strides_of(grad_lse, packed), call.rows, call.max_queries, capacity,
        NATURAL=call.flags["NATURAL"], D=call.flags["D"], BLOCK_D=call.block_d, PADDING=SCRATCH_TILE,
        num_warps=max(4, call.block_d // 16), enable_fp_fusion=True,
    )  # fmt: skip
    return {"levels": scratch[0], "deltas": scratch[1], "capacity": capacity}


def _queries(call: Call, tile: Tile, grad_out: Tensor, scratch: dict[str, Any], grad_query: Tensor) -> None:
    from prefix_fast.kernels.prefix_attention_bwd_dq import dq_kernel

    packed = call.problem.cu_seqlens_q is not None
    dq_kernel[(call.query_tiles(tile.queries), call.heads)](
        query=call.problem.query, grad_out=grad_out, grad_query=grad_query,
        query_strides=strides_of(call.problem.query, packed), grad_strides=strides_of(grad_out, packed),
        target_strides=strides_of(grad_query, packed), **scratch,
        **call.chain, **call.positions, **call.numbers, **call.flags, **call.launch(tile),
    )  # fmt: skip


def _set(
    call: Call, tile: Tile, index: int, grad_out: Tensor, scratch: dict[str, Any], grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of one set's keys and values; of the own tokens, the last of the chain."""
    from prefix_fast.kernels.prefix_attention_bwd_dkv import dkv_kernel

    packed_rows = call.problem.cu_seqlens_q is not None
    own = index == len(call.problem.sets)
    cu_seqlens = call.chain["sets"][index][4]
    count, size = call.sizes[index]
    packed = cu_seqlens is not None
    tiles = unit_tiles(count, size, packed, tile.keys)
    query_tiles = -(-call.max_queries // (tile.queries * (call.rows if packed_rows else 1)))
    pairs = call.heads // call.kv_heads * (1 if own else max(call.rows // max(count, 1), 1))
    splits = reader_splits(call.device, tiles * call.kv_heads, pairs, 1 if packed_rows else query_tiles)
    parts = splits.readers * splits.queries
    targets = [partials_of(grad, parts) for grad in (grad_key, grad_value)]
    order, starts = call.readers(index)
    strides = [(0, 0, 0) if t is None else strides_of(t, packed) for t in (grad_key, grad_value)]
    dkv_kernel[(tiles * parts, call.kv_heads)](
        query=call.problem.query, grad_out=grad_out, grad_key=targets[0], grad_value=targets[1], order=order,
        starts=starts, query_strides=strides_of(call.problem.query, packed_rows),
        grad_strides=strides_of(grad_out, packed_rows), key_strides=strides[0], value_strides=strides[1],
        split_strides=tuple(0 if t is None or parts == 1 else t.shape[1] for t in targets),
        tiles=tiles, splits=splits.readers, query_splits=splits.queries, SET=index, WANT_K=grad_key is not None,
        WANT_V=grad_value is not None, **scratch, **call.chain, **call.positions, **call.numbers, **call.flags,
        **call.launch(tile),
    )  # fmt: skip
    for grad, partials in zip((grad_key, grad_value), targets, strict=True):
        add_partials(partials, grad)
