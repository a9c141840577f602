"""What a frozen model computes between its matrix products, in one pass each way and with nothing kept but the inputs.

    gated_unit   act(gate) · up,  act = silu or the tanh form of gelu
    rms_norm     x · rsqrt(mean x² + eps) · (offset + weight)

Each answers None where the caller's own code is to run: tensors that are not plain ones on the CPU, a weight that is
trained, a tracer or a mode that watches PyTorch's operators. In float32, rounded once to the tensors' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_fast import linears
from prefix_fast.backends import pointwise


def gated_unit(gate: Any, up: Any, activation: str) -> Tensor | None:
    """act(gate) · up of two tensors [...] of one shape and dtype; `up` None: act(gate).

    Args:
        activation: "silu", x · sigmoid(x), or "gelu_tanh", ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    """
    tensors = [gate] if up is None else [gate, up]
    if not linears.are_plain(*tensors) or any(t.shape != gate.shape or t.dtype != gate.dtype for t in tensors):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _GatedUnit.apply(gate, up, activation)
    return pointwise.gated(gate, up, activation)


def rms_norm(x: Any, weight: Any, eps: float, offset: float = 0.0) -> Tensor | None:
    """The norm of x [..., H] with a frozen weight [H] of x's dtype; a gradient for x alone."""
    if not linears.are_plain(x) or not linears.is_frozen(weight, x) or weight.shape != x.shape[-1:]:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps, offset)
    return pointwise.rms_norm(x, weight, eps, offset)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return pointwise.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled() and grad.requires_grad:
            return *_graph_of(functools.partial(_unit, ctx.activation), grad, gate, up), None
        return *pointwise.gated_backward(grad, gate, up, ctx.activation), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.terms = eps, offset
        return pointwise.rms_norm(x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() and grad.requires_grad:
            return *_graph_of(lambda x: _norm(x, weight, *ctx.terms), grad, x), None, None, None
        eps, offset = ctx.terms
        return pointwise.rms_norm(x, weight, eps, offset, grad), None, None, None


def _graph_of(function: Callable, grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients of the inputs with a graph of their own, by PyTorch's operators."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [None if tensor is None or not tensor.requires_grad else next(found) for tensor in inputs]


def _unit(activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return active if up is None else active * up


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (offset + weight.float())).to(x.dtype)
