"""Launches the split forward and the merge: decode, speculative verification, rows of few queries."""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_fast.backends.triton_call import Call, odd, odd_strides_of, strides_of
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_cost import Split

PARTS = 8  # partial results that the merge reads at a time


def forward(call: Call, tile: Tile, split: Split, out: Tensor, lse: Tensor) -> None:
    """Write every element of out and of lse, by way of float32 partial results."""
    from prefix_fast.kernels.merge_states import merge_kernel
    from prefix_fast.kernels.prefix_attention_split_fwd import split_forward_kernel

    problem, flags = call.problem, call.flags
    readers = tuple(call.readers(index) for index in range(len(call.sizes)))
    tiles = tuple(_tiles(call, split, index) for index in range(len(readers)))
    chunks = tuple(count if tiles[index] else 0 for index, count in enumerate(split.chunks))
    odd_chunks = tuple(map(odd, chunks))
    slots = call.rows * call.heads * call.max_queries
    partial_out = out.new_empty((sum(chunks), slots, flags["D"]), dtype=lse.dtype)
    partial_lse = lse.new_empty((sum(chunks), slots))
    if call.trial is not None:  # what a wrong kernel leaves out must show
        partial_out.fill_(torch.nan)
        partial_lse.fill_(torch.nan)
    items = sum(count * number for count, number in zip(tiles, chunks, strict=True))
    if items > 0:
        launch = {**call.launch(tile._replace(queries=split.queries)), "BLOCK_OWN": split.own_queries}
        split_forward_kernel[(items, call.kv_heads)](
            query=problem.query, partial_out=partial_out, partial_lse=partial_lse, readers=readers,
            query_strides=strides_of(problem.query, False), odd_tiles=tuple(map(odd, tiles)), odd_chunks=odd_chunks,
            **call.chain, **call.positions, **call.numbers, **flags, **launch,
        )  # fmt: skip
    merge_kernel[(slots,)](
        partial_out, partial_lse, out, lse, problem.sinks, call.chain["sets"], call.chain["odd_sizes"],
        strides_of(out, False), odd_strides_of(lse, False), call.rows, call.max_queries, call.kv_heads, odd_chunks,
        SETS=flags["SETS"], GROUP=flags["GROUP"], D=flags["D"], BLOCK_D=call.block_d, PARTS=PARTS,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def _tiles(call: Call, split: Split, index: int) -> int:
    """Tiles of queries of one set, or of the own tokens: where the readers are a list, an upper bound."""
    folded = call.max_queries * call.heads // call.kv_heads
    count, size = call.sizes[index]
    if count == 0 or size == 0:
        return 0
    if index == call.flags["SETS"]:
        return call.rows * -(-folded // split.own_queries)
    if call.problem.sets[index].ids is None:
        return -(-call.rows * folded // split.queries)
    return call.rows * folded // split.queries + count
