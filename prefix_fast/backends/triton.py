"""The `triton` backend: launches the kernels of `prefix_fast.kernels` on CUDA and ROCm devices.

With TRITON_INTERPRET=1 in the environment before the first call, Triton's interpreter runs them on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from prefix_fast.backends.problem import Facts, Grads, Problem
from prefix_fast.backends.triton_call import SCRATCH_TILE, Call, make_call, readers_of, strides_of, unit_tiles
from prefix_fast.backends.triton_config import Tile, Tiles, device_of, splits_for, tiles_for

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
OLDEST = (3, 6)


def availability() -> str | None:
    """None where the backend can run; otherwise why not."""
    version = _triton_version()
    if version is None:
        return "triton is not installed; install prefix-fast[triton]"
    if version < OLDEST:
        return f"expected triton >= {_dotted(OLDEST)}, got {_dotted(version)}; upgrade triton"
    if not interpreting() and not torch.cuda.is_available():
        return "this machine has no CUDA or ROCm device; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
    return None


def device() -> str:
    """Device type of the tensors it takes."""
    return "cpu" if interpreting() else "cuda"


def unsupported_reasons(facts: Facts) -> list[str]:
    """Why a call with these facts cannot run here. Empty: it can."""
    reasons = []
    if facts.dtype not in DTYPES:
        reasons.append(f"the triton backend takes float32, bfloat16 and float16, not {str(facts.dtype)[6:]}")
    if facts.head_dim > MAX_HEAD_DIM:
        reasons.append(f"the triton backend takes head dims up to {MAX_HEAD_DIM}, not {facts.head_dim}")
    wanted = "cpu" if interpreting() else "cuda"
    if facts.device != wanted:
        why = "with TRITON_INTERPRET=1" if interpreting() else "(on the CPU only with TRITON_INTERPRET=1)"
        reasons.append(f"the triton backend takes {wanted} tensors {why}, not {facts.device}")
    return reasons


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write every element of out and of lse; see `prefix_fast.kernels.prefix_attention_fwd` for the formula."""
    if out.numel() == 0:
        return
    with torch.cuda.device_of(problem.query):  # a launch goes to the current device
        call, tiles = _prepare(problem)
        _forward_by_row(call, tiles, out, lse)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: Grads
) -> None:
    """Write every element of every gradient that is wanted, and compute no other."""
    pairs = [*grads.sets, (grads.key, grads.value)]
    wanted = [t for t in (grads.query, *(t for pair in pairs for t in pair)) if t is not None and t.numel() > 0]
    if out.numel() == 0:
        for target in wanted:
            target.zero_()
        return
    if not wanted:
        return
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    with torch.cuda.device_of(problem.query):
        call, tiles = _prepare(problem)
        scratch = _prepare_backward(call, out, lse, grad_out, grad_lse)
        if grads.query is not None:
            _differentiate_queries(call, tiles.dq, grad_out, scratch, grads.query)
        for index, (grad_key, grad_value) in enumerate(pairs):
            if any(t is not None and t.numel() > 0 for t in (grad_key, grad_value)):
                _differentiate_set(call, tiles.dkv, index, grad_out, scratch, grad_key, grad_value)


def _prepare(problem: Problem) -> tuple[Call, Tiles]:
    device = device_of(problem.query.device.index if problem.query.device.type == "cuda" else None)
    call = make_call(problem, device, interpreting())
    return call, tiles_for(device, call.block_d, problem.query.dtype)


def _forward_by_row(call: Call, tiles: Tiles, out: Tensor, lse: Tensor) -> None:
    from prefix_fast.kernels.prefix_attention_fwd import forward_kernel

    packed = call.problem.cu_seqlens_q is not None
    grid = (call.query_tiles(tiles.forward.queries), call.heads)
    forward_kernel[grid](
        query=call.problem.query, out=out, lse=lse, sinks=call.problem.sinks,
        query_strides=strides_of(call.problem.query, packed), out_strides=strides_of(out, packed),
        lse_strides=strides_of(lse, packed),
        **call.chain, **call.positions, **call.numbers, **call.flags, **call.launch(tiles.forward),
    )  # fmt: skip


def _prepare_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> dict[str, Any]:
    """δ and lse of every query, padded to whole tiles."""
    from prefix_fast.kernels.prefix_attention_bwd_dq import prepare_kernel

    packed = call.problem.cu_seqlens_q is not None
    tiles = call.query_tiles(SCRATCH_TILE)
    capacity = out.shape[0] + call.rows * SCRATCH_TILE if packed else tiles * SCRATCH_TILE
    scratch = out.new_empty((2, call.heads, capacity), dtype=torch.float32)
    prepare_kernel[(tiles, call.heads)](
        out, lse, grad_out, grad_lse, call.problem.cu_seqlens_q, scratch[0], scratch[1],
        strides_of(out, packed), strides_of(lse, packed), strides_of(grad_out, packed),
        (0, 0, 0) if grad_lse is None else strides_of(grad_lse, packed), call.rows, call.max_queries, capacity,
        NATURAL=call.flags["NATURAL"], D=call.flags["D"], BLOCK_D=call.block_d, PADDING=SCRATCH_TILE,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return {"levels": scratch[0], "deltas": scratch[1], "capacity": capacity}


def _differentiate_queries(
    call: Call, tile: Tile, grad_out: Tensor, scratch: dict[str, Any], grad_query: Tensor
) -> None:
    from prefix_fast.kernels.prefix_attention_bwd_dq import dq_kernel

    packed = call.problem.cu_seqlens_q is not None
    dq_kernel[(call.query_tiles(tile.queries), call.heads)](
        query=call.problem.query, grad_out=grad_out, grad_query=grad_query,
        query_strides=strides_of(call.problem.query, packed), grad_strides=strides_of(grad_out, packed),
        target_strides=strides_of(grad_query, packed), **scratch,
        **call.chain, **call.positions, **call.numbers, **call.flags, **call.launch(tile),
    )  # fmt: skip


def _differentiate_set(
    call: Call, tile: Tile, index: int, grad_out: Tensor, scratch: dict[str, Any], grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of one set's keys and values; of the own tokens, the last of the chain."""
    from prefix_fast.kernels.prefix_attention_bwd_dkv import dkv_kernel

    packed_rows = call.problem.cu_seqlens_q is not None
    own = index == len(call.problem.sets)
    _, _, ids, _, cu_seqlens, _ = call.chain["sets"][index]
    count, size = call.chain["set_sizes"][index]
    packed = cu_seqlens is not None
    tiles = unit_tiles(count, size, packed, tile.keys)
    query_tiles = -(-call.max_queries // (tile.queries * (call.rows if packed_rows else 1)))
    pairs = call.heads // call.kv_heads * (1 if own else max(call.rows // max(count, 1), 1))
    splits = splits_for(call.device, tiles * call.kv_heads, pairs, 1 if packed_rows else query_tiles)
    parts = splits.readers * splits.queries
    targets = [_partials(grad, parts) for grad in (grad_key, grad_value)]
    order, starts = (None, None) if ids is None else readers_of(ids, count)
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
    if parts > 1:
        for grad, partials in zip((grad_key, grad_value), targets, strict=True):
            if grad is not None and partials is not None:
                _reduce(partials, grad)


def _partials(grad: Tensor | None, parts: int) -> Tensor | None:
    """Where a split kernel writes: the gradient itself, or float32 copies of its memory."""
    if grad is None or parts == 1:
        return grad
    return grad.new_empty((parts, grad.numel()), dtype=torch.float32)


def _reduce(partials: Tensor, grad: Tensor) -> None:
    """Add the partial sums; they and the gradient, which is dense in memory, have the same order of elements."""
    from prefix_fast.kernels.prefix_attention_bwd_dkv import reduce_kernel

    parts, count = partials.shape
    block = 1024
    reduce_kernel[(-(-count // block),)](partials, grad, count, parts, BLOCK=block, num_warps=4)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _triton_version() -> tuple[int, ...] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # another distribution ships the module
        return OLDEST
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
