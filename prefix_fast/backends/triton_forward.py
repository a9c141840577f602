"""Launches the forward kernels: one pass over each row's chain, or split by segments and merged."""

from __future__ import annotations

import functools

from torch import Tensor

from prefix_fast.backends import triton_decode
from prefix_fast.backends.triton_call import Call, odd_strides_of, strides_of
from prefix_fast.backends.triton_config import Tile, Tiles
from prefix_fast.backends.triton_cost import Shape, Split, blocks, key_chunks, least_chunk


def forward(call: Call, tiles: Tiles, out: Tensor, lse: Tensor) -> None:
    """Write every element of out and of lse."""
    tiles = call.fitting(tiles)
    split = choose_split(call, tiles)
    if split is not None:
        call.run("split", tiles, lambda tile: _split(call, tile, split, tiles.split.queries, out, lse))
    else:
        call.run(_kernel_of_one_pass(call, tiles), tiles, lambda tile: _one_pass(call, tile, out, lse))


def choose_split(call: Call, tiles: Tiles) -> Split | None:
    """How the split forward divides the call; None: one pass. A kernel on trial runs whatever the cost model says."""
    if call.trial == "split":
        return Split(*blocks(shape_of(call), tiles.split), (2,) * len(call.sizes))
    if call.trial is not None:
        return None
    if call.problem.cu_seqlens_q is not None:
        return None
    return _choose(call.device, shape_of(call), tiles.split, tiles.few)


_choose = functools.lru_cache(maxsize=1024)(key_chunks)


def _split(call: Call, tile: Tile, split: Split, most: int, out: Tensor, lse: Tensor) -> None:
    """The same chunks of keys whatever the tile; fewer queries in one where it is smaller than that of the choice."""
    if tile.queries < most:
        queries, own_queries = (min(number, tile.queries) for number in (split.queries, split.own_queries))
        split = split._replace(queries=queries, own_queries=own_queries)
    triton_decode.forward(call, tile, split, out, lse)


def shape_of(call: Call) -> Shape:
    """The static shape of a dense call; own keys rounded up, so that a growing cache seldom changes its division."""
    problem = call.problem
    least = least_chunk(call.device)
    keys = -(-call.max_keys // least) * least
    sets = tuple(
        (count, size if s.cu_seqlens is None else -(-size // max(count, 1)))
        for s, (count, size) in zip(problem.sets, call.sizes, strict=False)
    )
    return Shape(
        call.rows, call.heads, call.kv_heads, call.max_queries, keys, call.flags["D"],
        problem.query.element_size(), sets, problem.is_causal, call.flags["PRECISION"] != "ieee",
    )  # fmt: skip


def _kernel_of_one_pass(call: Call, tiles: Tiles) -> str:
    """That of few queries where at most two of its tiles hold a row; of packed rows the longest is known, or not."""
    longest = call.max_queries if call.problem.cu_seqlens_q is None else call.problem.max_seqlen_q
    few = longest is not None and longest <= 2 * tiles.few.queries
    return "few" if call.trial == "few" or (call.trial is None and few) else "forward"


def _one_pass(call: Call, tile: Tile, out: Tensor, lse: Tensor) -> None:
    from prefix_fast.kernels.prefix_attention_fwd import forward_kernel

    packed = call.problem.cu_seqlens_q is not None
    forward_kernel[(call.query_tiles(tile.queries), call.heads)](
        query=call.problem.query, out=out, lse=lse, sinks=call.problem.sinks,
        query_strides=strides_of(call.problem.query, packed), out_strides=strides_of(out, packed),
        lse_strides=odd_strides_of(lse, packed),
        **call.chain, **call.positions, **call.numbers, **call.flags, **call.launch(tile),
    )  # fmt: skip
