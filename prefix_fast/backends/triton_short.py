"""Launches the fused backward of a short prefix: the gradients of the queries and of the prefix in one kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prefix_fast.backends.problem import Grads
from prefix_fast.backends.triton_call import Call, strides_of
from prefix_fast.backends.triton_config import Tile, padded, safe_tiles
from prefix_fast.backends.triton_cost import fuses_short_prefix, short_splits
from prefix_fast.backends.triton_forward import shape_of
from prefix_fast.backends.triton_partials import add_partials, partials_of


def fuses(call: Call, tile: Tile, grads: Grads) -> bool:
    """Whether the gradients of the queries and of the only shared set are wanted, and come cheaper from one kernel.

    Packed rows and packed segments have no static number of query tiles and keys to share out. Where the kernel is
    unchecked or failed its check, its tile is the safe one, and dq and dkv serve.
    """
    problem = call.problem
    packed = problem.cu_seqlens_q is not None or any(s.cu_seqlens is not None for s in problem.sets)
    if packed or len(problem.sets) != 1 or tile == safe_tiles(call.block_d).short:
        return False
    wanted = grads.query is not None and any(t is not None and t.numel() > 0 for t in grads.sets[0])
    on_trial = call.trial in (None, "short")
    return wanted and on_trial and fuses_short_prefix(call.device, shape_of(call), tile)


def queries_and_segments(
    call: Call, tile: Tile, grad_out: Tensor, scratch: dict[str, Any], grad_query: Tensor, grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of all queries, and of the keys and values of the only shared set, where they are wanted."""
    from prefix_fast.kernels.prefix_attention_bwd_short import short_kernel

    order, starts = call.readers(0)
    count, size = call.sizes[0]
    splits = short_splits(call.device, shape_of(call), tile)
    units = count if order is None else count + 1  # the rows that read none
    targets = [partials_of(grad, splits) for grad in (grad_key, grad_value)]
    strides = [(0, 0, 0) if grad is None else strides_of(grad, False) for grad in (grad_key, grad_value)]
    short_kernel[(units * splits, call.kv_heads)](
        query=call.problem.query, grad_out=grad_out, grad_query=grad_query, grad_key=targets[0], grad_value=targets[1],
        order=order, starts=starts, query_strides=strides_of(call.problem.query, False),
        grad_strides=strides_of(grad_out, False), target_strides=strides_of(grad_query, False),
        key_strides=strides[0], value_strides=strides[1],
        split_strides=tuple(0 if t is None or splits == 1 else t.shape[1] for t in targets), splits=splits,
        BLOCK_P=padded(size), WANT_K=grad_key is not None, WANT_V=grad_value is not None, **scratch,
        **call.chain, **call.positions, **call.numbers, **call.flags, **call.launch(tile),
    )  # fmt: skip
    for grad, partials in zip((grad_key, grad_value), targets, strict=True):
        add_partials(partials, grad)
