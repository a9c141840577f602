"""The C++ kernels between a frozen model's matrix products (`csrc/cpu/pointwise.cpp`), on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_fast.backends import native


def gated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """act(gate) · up, elementwise; without `up` act(gate). `activation`: "silu" or "gelu_tanh"."""
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    out = torch.empty_like(gate)
    native.extension().gated_forward(_flat(gate), _flat(up), _flat(out), activation, torch.get_num_threads())
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), None if up is None else up.contiguous()
    grads = torch.empty_like(gate), None if up is None else torch.empty_like(up)
    tensors = (_flat(tensor) for tensor in (grad, gate, up, *grads))
    native.extension().gated_backward(*tensors, activation, torch.get_num_threads())
    return grads


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, grad: Tensor | None = None) -> Tensor:
    """x · rsqrt(mean x² + eps) · (offset + weight) over the last dimension; with `grad` of that, the gradient of x."""
    x, grad = x.contiguous(), None if grad is None else grad.contiguous()
    out = torch.empty_like(x)
    rows = out.view(-1, x.shape[-1])
    native.extension().rms_norm(_flat(grad), _flat(x), weight, rows, eps, offset, torch.get_num_threads())
    return out


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.view(-1)
