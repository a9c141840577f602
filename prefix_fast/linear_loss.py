"""A frozen head and its loss in one pass over chunks of rows, which never holds more logits than those of a chunk.

    x_i  = h_i · Wᵀ + bias
    loss = Σ_i w_i · (lse_i - (1 - ε) y_i[t_i] - ε · mean_v y_i[v] + z · lse_i²) / denominator,  y_i of x_i: see `Terms`

For each chunk: one product, one pass over the logits that leaves dloss/dx in their place, one product dx · W. So the
gradient of the hidden states is ready when the loss is, and the backward pass scales it.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefix_fast import linears
from prefix_fast.backends import cross_entropy
from prefix_fast.backends.cross_entropy import Terms

CHUNK_BYTES = 1 << 25  # of logits; shorter chunks read the weights too often
CHUNK_ROWS = 1 << 13  # whose losses one thread adds up


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of a frozen linear head; differentiable in the hidden states.

    Under autocast, hidden states and head are cast as a linear layer casts them. On a GPU nothing waits for the device.

    Args:
        hidden: [..., H]; float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype, frozen. bias: [V], frozen, or None.
        targets: [...] integers, in [0, V) or `ignore_index`.
        weights: [...] factors of the tokens' losses, or None for ones.
        denominator: what the sum is divided by, as `num_items_in_batch`; 1 gives the sum. None: the sum of the weights
            of the labelled tokens, which gives the mean (NaN if there is none).
        ignore_index: marks a token without a label.
        label_smoothing: ε.
        z_loss: z.
        logit_scale, softcap: y = softcap · tanh(logit_scale · x / softcap), or logit_scale · x where softcap is None.

    Returns:
        The loss, 0-dimensional, in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, a head that requires gradients, or (on the CPU) a label out of the
            vocabulary. On a GPU such a label makes the loss NaN; with PREFIX_FAST_DEBUG=1 it raises there too.
        TypeError: dtypes that differ or that are not supported.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(hidden, weight, bias, targets, weights)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64).contiguous()
    sums = torch.promote_types(hidden.dtype, torch.float32)
    factors = None if weights is None else weights.detach().reshape(-1).to(sums).contiguous()
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: expected softcap > 0, or None for none, got {softcap}")
    _check_labels(targets, weight.shape[0], ignore_index)
    terms = Terms(ignore_index, label_smoothing, z_loss, logit_scale, softcap)
    if denominator is None:
        kept = targets != ignore_index
        denominator = kept.sum() if factors is None else factors.where(kept, 0).sum()
    with torch.autocast(device, enabled=False):
        wanted = rows.requires_grad and torch.is_grad_enabled()
        total = _LinearCrossEntropy.apply(rows, weight, bias, targets, factors, terms, wanted)
    return total / (denominator.to(total.device) if isinstance(denominator, Tensor) else denominator)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the rows' losses."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor | None,
        terms: Terms, wanted: bool,
    ) -> Tensor:  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted else None
        chunk = chunk_rows(hidden.shape[0], weight.shape[0], hidden.element_size())
        buffers: dict[str, Tensor] = {}
        for first in range(0, hidden.shape[0], chunk):
            part = slice(first, first + chunk)
            states = hidden[part]
            logits = _product(states, weight, bias, False, buffers)
            losses = cross_entropy.run(logits, targets[part], None if factors is None else factors[part], terms, wanted)
            total += losses.sum()
            if grad is not None:
                grad[part] = _product(logits, weight, None, True, buffers)
            del logits
        ctx.save_for_backward(grad, hidden)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad, hidden = ctx.saved_tensors
        if grad is not None:
            grad = grad * grad_total
            if torch.is_grad_enabled():
                grad = _OnceDifferentiable.apply(grad, hidden)
        return grad, None, None, None, None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, buffers: dict[str, Tensor]) -> Tensor:
    """x · Wᵀ + bias, or x · W, through the fastest library here; PyTorch's own fills the same buffer each time."""
    found = linears.frozen_linear(x, weight, bias, transposed)
    if found is not None:
        return found
    matrix, name = (weight, "gradient") if transposed else (weight.t(), "logits")
    if name not in buffers:
        buffers[name] = x.new_empty((x.shape[0], matrix.shape[1]))
    out = buffers[name][: x.shape[0]]
    return torch.mm(x, matrix, out=out) if bias is None else torch.addmm(bias, x, matrix, out=out)


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on a computed gradient, whose own derivative does not exist and says so."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, hidden: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> NoReturn:
        raise NotImplementedError(
            "linear_cross_entropy: expected one derivative, got a backward through its gradient; use"
            " torch.nn.functional.linear and cross_entropy"
        )


def chunk_rows(rows: int, vocabulary: int, element: int) -> int:
    """Rows of a chunk: as many as have `CHUNK_BYTES` of logits, in chunks of nearly the same size."""
    most = min(max(CHUNK_BYTES // max(vocabulary * element, 1), 1), CHUNK_ROWS)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks), 1)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None) -> None:
    name = "linear_cross_entropy"
    if not hidden.is_floating_point() or targets.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point hidden states and integer targets, got {hidden.dtype} and {targets.dtype}"
        )
    shape = tuple(hidden.shape[:-1])
    for label, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {label} {shape}, one for each hidden state, got {tuple(tensor.shape)}")
    vocabulary = weight.shape[0]
    for label, tensor, wanted in (("weight", weight, (vocabulary, hidden.shape[-1])), ("bias", bias, (vocabulary,))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: expected {label} {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected {label} in {hidden.dtype}, as hidden, got {tensor.dtype}; cast one")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a frozen head, got a {label} that requires gradients; freeze it, or use"
                " torch.nn.functional.linear and cross_entropy"
            )


def _check_labels(targets: Tensor, vocabulary: int, ignored: int) -> None:
    """Only where reading them makes nobody wait."""
    if targets.device.type != "cpu" and os.environ.get("PREFIX_FAST_DEBUG") != "1":
        return
    wrong = (targets != ignored) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        found = int(targets[wrong][0])
        raise ValueError(
            f"linear_cross_entropy: expected labels from 0 to {vocabulary - 1}, or {ignored} for none, got {found};"
            " look whether the labels are of this model's tokenizer"
        )
