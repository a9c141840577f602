"""The loss of rows of logits, and in the logits' place its gradient.

For each row x [V] with target t and weight w, where y = cap · tanh(scale · x / cap), or scale · x without a cap:

    lse   = log Σ_v e^{y_v}          p_v = e^{y_v - lse}
    loss  = w · (lse - (1 - ε) y_t - ε · mean_v y_v + z · lse²)
    dx_v  = w · ((1 + 2 z lse) p_v - (1 - ε) [v = t] - ε / V) · scale · (1 - tanh²)

One program owns a row and reads it twice, from the cache the second time; everything is in float32. A row whose target
is ignored has the loss 0 and a gradient of zeros. A target outside of [0, V) is no address: its row's loss is NaN.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.primitives import INFINITY, LOG2E, tanh


@triton.jit
def _logits(row, columns, inside, scale, softcap, CAPPED: tl.constexpr):
    """y of some columns, -inf beyond the vocabulary, and the derivative of y by x."""
    y = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32) * scale
    slope = scale
    if CAPPED:
        bounded = tanh(y / softcap)
        y = softcap * bounded
        slope = scale * (1 - bounded * bounded)
    return tl.where(inside, y, -INFINITY), slope


@triton.jit(do_not_specialize=["vocabulary", "ignored"])
def cross_entropy_kernel(
    logits, targets, weights, losses, vocabulary, ignored, scale, softcap, epsilon, z_loss,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (N,), a row each. logits [N, V] contiguous; targets int64, weights (None: 1) and losses [N] float32."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * vocabulary
    target = tl.load(targets + index)
    weight = 1.0 if weights is None else tl.load(weights + index)
    kept = target != ignored
    block = tl.arange(0, BLOCK)
    words = tl.where(kept, vocabulary, 0)  # that are read

    maximum = -float("inf")
    total = 0.0
    at_target = 0.0
    sum_of_logits = 0.0
    for first in range(0, words, BLOCK):
        columns = first + block
        inside = columns < vocabulary
        y, _ = _logits(row, columns, inside, scale, softcap, CAPPED)
        new_maximum = tl.maximum(maximum, tl.max(y, 0))
        reference = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)
        total = total * tl.exp2((maximum - reference) * LOG2E) + tl.sum(tl.exp2((y - reference) * LOG2E), 0)
        maximum = new_maximum
        at_target += tl.sum(tl.where(columns == target, y, 0.0), 0)
        sum_of_logits += tl.sum(tl.where(inside, y, 0.0), 0)

    maximum = tl.where(kept, maximum, 0.0)
    total = tl.where(kept, total, 1.0)
    lse = maximum + tl.log(total)
    loss = maximum - at_target + tl.log(total) + z_loss * lse * lse
    if epsilon > 0:
        loss += epsilon * (at_target - sum_of_logits / vocabulary)
    known = (target >= 0) & (target < vocabulary)
    loss = tl.where(known, weight * loss, float("nan"))
    tl.store(losses + index, tl.where(kept, loss, 0.0))
    if GRADIENT:
        common = weight * (1 + 2 * z_loss * lse) / total
        for first in range(0, words, BLOCK):
            columns = first + block
            inside = columns < vocabulary
            y, slope = _logits(row, columns, inside, scale, softcap, CAPPED)
            grad = common * tl.exp2((y - maximum) * LOG2E) - weight * epsilon / vocabulary
            grad -= tl.where(columns == target, weight * (1 - epsilon), 0.0)
            tl.store(row + columns, (grad * slope).to(logits.dtype.element_ty), mask=inside)
        for first in range(words, vocabulary, BLOCK):
            zeros = tl.zeros((BLOCK,), logits.dtype.element_ty)
            tl.store(row + first + block, zeros, mask=first + block < vocabulary)
