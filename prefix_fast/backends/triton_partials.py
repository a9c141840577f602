"""Partial sums that the programs of a split kernel write, and their sum in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def partials_of(grad: Tensor | None, parts: int) -> Tensor | None:
    """Where a split kernel writes: the gradient itself, or float32 copies of its memory."""
    if grad is None or parts == 1:
        return grad
    return grad.new_empty((parts, grad.numel()), dtype=torch.float32)


def add_partials(partials: Tensor | None, grad: Tensor | None) -> None:
    """Write the sum of the partials; they and the gradient, which is dense in memory, have the same order of elements.

    What `partials_of` returned for a kernel that is not split is the gradient itself, and needs nothing.
    """
    if partials is None or grad is None or partials is grad:
        return
    from prefix_fast.kernels.prefix_attention_bwd_dkv import reduce_kernel

    parts, count = partials.shape
    block = 1024
    reduce_kernel[(-(-count // block),)](partials, grad, count, parts, BLOCK=block, num_warps=4, enable_fp_fusion=True)
