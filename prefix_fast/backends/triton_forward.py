"""Launches the forward kernels."""

from __future__ import annotations

from torch import Tensor

from prefix_fast.backends.triton_call import Call, odd_strides_of, strides_of
from prefix_fast.backends.triton_config import Tiles


def forward(call: Call, tiles: Tiles, out: Tensor, lse: Tensor) -> None:
    """Write every element of out and of lse."""
    from prefix_fast.kernels.prefix_attention_fwd import forward_kernel

    packed = call.problem.cu_seqlens_q is not None
    grid = (call.query_tiles(tiles.forward.queries), call.heads)
    forward_kernel[grid](
        query=call.problem.query, out=out, lse=lse, sinks=call.problem.sinks,
        query_strides=strides_of(call.problem.query, packed), out_strides=strides_of(out, packed),
        lse_strides=odd_strides_of(lse, packed),
        **call.chain, **call.positions, **call.numbers, **call.flags, **call.launch(tiles.forward),
    )  # fmt: skip
