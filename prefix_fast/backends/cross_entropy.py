"""The loss of rows of logits, and its gradient in the logits' place: in plain PyTorch, in C++ and in Triton.

For each row x with target t and weight w, where y = cap · tanh(scale · x / cap), or scale · x without a cap:

    lse   = log Σ_v e^{y_v}          p_v = e^{y_v - lse}
    loss  = w · (lse - (1 - ε) y_t - ε · mean_v y_v + z · lse²)
    dx_v  = w · ((1 + 2 z lse) p_v - (1 - ε) [v = t] - ε / V) · scale · (1 - tanh²)

A row whose target is ignored has the loss 0 and a gradient of zeros. All sums are in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefix_fast.backends import native, triton

BLOCK = 4096  # words of a row that a program of the Triton kernel takes at a time


class Terms(NamedTuple):
    """What the loss is made of: see the module's formula."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None


def run(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms, gradient: bool) -> Tensor:
    """The row losses [N], in float32 (float64 for float64). With `gradient`, the logits become their gradient.

    Args:
        logits: [N, V], contiguous.
        targets: [N] int64, in [0, V) or ignored. On a GPU another one gives a loss of NaN.
        weights: [N] float32, or None for ones.
        terms: of the loss.
        gradient: whether it is wanted; otherwise the logits stay as they are, or not.
    """
    device, dtype = logits.device.type, logits.dtype
    if logits.numel() == 0 or dtype not in native.DTYPES:
        return plain(logits, targets, weights, terms, gradient)
    if device == "cpu" and not triton.interpreting() and native.availability() is None:
        return in_cpp(logits, targets, weights, terms, gradient)
    if device == triton.device() and triton.availability() is None:
        return in_triton(logits, targets, weights, terms, gradient)
    return plain(logits, targets, weights, terms, gradient)


def plain(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms, gradient: bool) -> Tensor:
    """`run` in plain PyTorch, which keeps some copies of the logits for the time of the call."""
    ignored, epsilon, z, scale, cap = terms
    y = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    slope = y.new_full((), scale)
    if cap is not None:
        bounded = torch.tanh(y / cap)
        y, slope = cap * bounded, scale * (1 - bounded * bounded)
    kept = targets != ignored
    chosen = targets.where(kept, 0)[:, None]
    weight = kept.to(y.dtype) if weights is None else weights.to(y.dtype).where(kept, 0)
    lse = torch.logsumexp(y, -1)
    losses = lse - (1 - epsilon) * y.gather(-1, chosen).squeeze(-1) + z * lse * lse
    if epsilon:
        losses = losses - epsilon * y.mean(-1)
    if gradient:
        grad = torch.exp(y - lse[:, None]).mul_((1 + 2 * z * lse)[:, None]).sub_(epsilon / max(y.shape[-1], 1))
        grad.scatter_add_(-1, chosen, grad.new_full(chosen.shape, epsilon - 1))
        logits.copy_(torch.where(kept[:, None], grad * slope * weight[:, None], 0))
    return torch.where(kept, weight * losses, 0)


def in_cpp(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms, gradient: bool) -> Tensor:
    """`run` on the CPU. The bits are those of one thread."""
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    ignored, epsilon, z, scale, cap = terms
    native.extension().cross_entropy(
        logits, targets, weights, losses, ignored, scale, cap or 0.0, epsilon, z, gradient, torch.get_num_threads()
    )
    return losses


def in_triton(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms, gradient: bool) -> Tensor:
    """`run` on a GPU, one program for each row, without a wait for the device."""
    from prefix_fast.kernels.cross_entropy import cross_entropy_kernel

    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    ignored, epsilon, z, scale, cap = terms
    with torch.cuda.device_of(logits):  # a launch goes to the current device
        cross_entropy_kernel[(logits.shape[0],)](
            logits, targets, weights, losses, logits.shape[1], ignored, scale, 1.0 if cap is None else cap, epsilon, z,
            CAPPED=cap is not None, GRADIENT=gradient, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return losses
