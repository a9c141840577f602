"""A `Problem` as the Triton kernels take it: spans, strides, sizes and compile-time flags. No value is read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_fast.backends.problem import Problem, SegmentSet, make_plan
from prefix_fast.backends.triton_config import Device, Tile, Tiles, padded, precision_of, safe_tiles, with_room
from prefix_fast.backends.triton_vetting import Configuration, Kind, warn_of_room

SCRATCH_TILE = 128  # the kernels' PADDING
_FARTHEST = 2**30  # as in the kernels: offsets and windows beyond change nothing


class Call(NamedTuple):
    """Arguments that several kernels take, under the kernels' own names."""

    problem: Problem
    device: Device
    rows: int
    heads: int
    kv_heads: int
    max_queries: int  # of a dense row; the total of packed ones
    max_keys: int
    block_d: int
    sizes: tuple[tuple[int, int], ...]  # (segments, tokens of one, or of all packed ones) of each set, then the own
    chain: dict[str, Any]  # the segment sets and the own tokens
    positions: dict[str, Any]  # where the queries stand, and what they see
    numbers: dict[str, Any]  # of the scores, the softmax and dropout
    flags: dict[str, Any]  # compile-time constants
    trial: str | None = None  # the kernel that a self-check runs, whatever the cost model would choose
    spare: bool = True  # where the card has no room for a kernel's tile, its safe one runs

    @property
    def kind(self) -> Kind:
        """What its configurations are vetted for."""
        dtype = self.problem.query.dtype
        return Kind(self.block_d, dtype, self.flags["PRECISION"], any(s.key.dtype != dtype for s in self.problem.sets))

    def fitting(self, tiles: Tiles) -> Tiles:
        """The tiles with room for the options of this call."""
        if not (self.flags["NATURAL"] or self.flags["DROPOUT"]):
            return tiles
        size = self.problem.query.element_size()
        biases = (self.problem.attn_bias, *(s.bias for s in self.problem.sets))
        wide_bias = any(bias is not None and bias.element_size() > size for bias in biases)
        return with_room(self.device, tiles, self.block_d, wide_bias)

    def launch(self, tile: Tile) -> dict[str, Any]:
        """Block sizes and launch options of a configuration. FP fusion is set, as its default changes with releases."""
        stages = 1 if self.kind.mixed else tile.stages  # float32 segments take twice the shared memory
        return {
            "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, "num_warps": tile.warps, "num_stages": stages,
            "enable_fp_fusion": True,
        }  # fmt: skip

    def run(self, kernel: str, tiles: Tiles, launch: Callable[[Tile], None]) -> None:
        """`launch` with the kernel's tile; Triton refuses one that the card has no room for before anything runs."""
        tile, safe = getattr(tiles, kernel), getattr(safe_tiles(self.block_d), kernel)
        try:
            launch(tile)
        except Exception as error:
            from triton.runtime.errors import OutOfResources

            if not self.spare or tile == safe or not isinstance(error, OutOfResources):
                raise
            warn_of_room(self.problem.query.device, Configuration(kernel, self.kind), str(error))
            launch(safe)

    def readers(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """The rows in order of the segment of set `index` that they read, and where each segment's begin (`Plan`).

        (None, None): every row reads segment 0.
        """
        chosen = self.problem.sets[index] if index < len(self.problem.sets) else None
        if chosen is None or chosen.ids is None:
            return None, None
        return chosen.plan or make_plan(chosen.ids, chosen.count)

    def query_tiles(self, block: int) -> int:
        """Number of query tiles of all rows."""
        return unit_tiles(self.rows, self.max_queries, self.problem.cu_seqlens_q is not None, block)


def unit_tiles(units: int, size: int, packed: bool, block: int) -> int:
    """Tiles of `units` spans of `size` tokens; of packed ones that have `size` tokens together, an upper bound."""
    return size // block + units if packed else units * -(-size // block)


def strides_of(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """(unit, head, token) strides of [units, heads, tokens, D] or packed [total, heads, D]; also without D."""
    return (0, tensor.stride(1), tensor.stride(0)) if packed else (tensor.stride(0), tensor.stride(1), tensor.stride(2))


def odd(number: int) -> int:
    """2n + 3, which the kernels turn back: for integers in tuples that change from call to call.

    Triton compiles a kernel anew for the value 1 and for multiples of 16; in tuples, `do_not_specialize` has no effect.
    """
    return 2 * number + 3


def odd_strides_of(tensor: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """`strides_of` lse or its gradient, whose unit and head strides change with the number of tokens."""
    unit, head, token = (0, 0, 0) if tensor is None else strides_of(tensor, packed)
    return odd(unit), odd(head), token


def make_call(problem: Problem, device: Device, interpreting: bool) -> Call:
    """Describe a problem to the kernels."""
    problem = _readable(problem)
    packed = problem.cu_seqlens_q is not None
    heads, head_dim = problem.query.shape[1], problem.query.shape[-1]
    max_queries = problem.query.shape[0] if packed else problem.query.shape[2]
    max_keys = problem.key.shape[0] if packed else problem.key.shape[2]
    kv_heads = problem.key.shape[1]
    block_d = padded(head_dim)
    upcast = interpreting and problem.query.dtype == torch.bfloat16
    flags = {
        "SETS": len(problem.sets), "IN_WINDOW": tuple(s.in_window for s in problem.sets), "GROUP": heads // kv_heads,
        "CAUSAL": problem.is_causal, "WINDOW": problem.window is not None, "SOFTCAP": problem.softcap is not None,
        "NATURAL": problem.attn_bias is not None or any(s.bias is not None for s in problem.sets),
        "DROPOUT": problem.dropout_p > 0, "D": head_dim, "BLOCK_D": block_d,
        "PRECISION": precision_of(problem.query.dtype, head_dim), "UPCAST": upcast,
    }  # fmt: skip
    return Call(
        problem, device, problem.num_rows, heads, kv_heads, max_queries, max_keys, block_d,
        *_chain(problem, max_queries, max_keys), _positions(problem, max_queries, max_keys), _numbers(problem), flags,
    )  # fmt: skip


def near(tensor: Tensor, tokens: int) -> Tensor:
    """The tensor, or a dense copy where int32 cannot hold the offsets in a tile along the dimension `tokens`."""
    return tensor.contiguous() if tensor.stride(tokens) >= 2**31 // SCRATCH_TILE else tensor


def _readable(problem: Problem) -> Problem:
    """The same call with tensors as the kernels read them: lists dense, tokens `near` each other."""
    rows = (problem.query, problem.key, problem.value)
    lists = (problem.cu_seqlens_q, problem.cu_seqlens_k, problem.sinks)
    given = [*rows, *lists, *(t for s in problem.sets for t in (s.key, s.value, s.ids, s.lengths, s.cu_seqlens))]
    if all(t is None or t.is_contiguous() for t in given):
        return problem
    query, key, value = (near(t, -2 if problem.cu_seqlens_q is None else -3) for t in rows)
    cu_seqlens_q, cu_seqlens_k, sinks = (None if t is None else t.contiguous() for t in lists)
    return replace(
        problem, query=query, key=key, value=value, sets=tuple(_readable_set(s) for s in problem.sets),
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sinks=sinks,
    )  # fmt: skip


def _readable_set(given: SegmentSet) -> SegmentSet:
    ids, lengths, cu_seqlens = (
        None if t is None else t.contiguous() for t in (given.ids, given.lengths, given.cu_seqlens)
    )
    key, value = (near(t, -2 if given.cu_seqlens is None else -3) for t in (given.key, given.value))
    return replace(given, key=key, value=value, ids=ids, lengths=lengths, cu_seqlens=cu_seqlens)


def _chain(problem: Problem, max_queries: int, max_keys: int) -> tuple[tuple[tuple[int, int], ...], dict[str, Any]]:
    rows, heads = problem.num_rows, problem.query.shape[1]
    packed = problem.cu_seqlens_q is not None
    sets, strides, sizes = [], [], []
    for s in problem.sets:
        size = s.key.shape[0] if s.cu_seqlens is not None else s.key.shape[2]
        bias, bias_strides = _bias(s.bias, (rows, heads, max_queries, size))
        sets.append((s.key, s.value, s.ids, s.lengths, s.cu_seqlens, bias))
        of_key, of_value = (strides_of(t, s.cu_seqlens is not None) for t in (s.key, s.value))
        strides.append((*of_key, *of_value, *bias_strides))
        sizes.append((s.count, size))
    bias, bias_strides = _bias(problem.attn_bias, (rows, heads, max_queries, max_keys))
    sets.append((problem.key, problem.value, None, None, problem.cu_seqlens_k, bias))
    strides.append((*strides_of(problem.key, packed), *strides_of(problem.value, packed), *bias_strides))
    sizes.append((rows, max_keys))
    odd_sizes = tuple((odd(count), odd(size)) for count, size in sizes)
    return tuple(sizes), {"sets": tuple(sets), "set_strides": tuple(strides), "odd_sizes": odd_sizes}


def _bias(bias: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, tuple[int, ...]]:
    if bias is None:
        return None, (0, 0, 0, 0)
    expanded = bias.expand(shape)
    return expanded, expanded.stride()


def _positions(problem: Problem, max_queries: int, max_keys: int) -> dict[str, Any]:
    mask, offset = problem.key_mask, problem.query_offset
    fixed: int | None = 0
    if offset is None:
        fixed = None if problem.cu_seqlens_q is not None else max_keys - max_queries
    elif not isinstance(offset, Tensor):
        fixed = max(-_FARTHEST, min(offset, _FARTHEST))
    return {
        "key_mask": None if mask is None else mask.view(torch.uint8),
        "mask_strides": (0, 0) if mask is None else (odd(mask.stride(0)), mask.stride(1)),
        "query_offset": offset if isinstance(offset, Tensor) else None,
        "offset_stride": offset.stride(0) if isinstance(offset, Tensor) and offset.dim() == 1 else 0,
        "fixed_offset": fixed,
        "cu_seqlens_q": problem.cu_seqlens_q,
        "window": 0 if problem.window is None else min(problem.window, _FARTHEST),
        "num_rows": problem.num_rows,
        "max_queries": max_queries,
    }


def _numbers(problem: Problem) -> dict[str, Any]:
    threshold = int(problem.dropout_p * 2**32)
    return {
        "seed": problem.dropout_seed,
        "scale": float(problem.scale),
        "softcap": 1.0 if problem.softcap is None else float(problem.softcap),
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,  # its bits as a signed integer
        "kept_share": 1.0 - problem.dropout_p,
    }
