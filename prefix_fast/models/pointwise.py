"""Modules of a frozen model whose elementwise chains become one operator each way: gated MLPs, RMS norms, GELUs.

A class is recognised by the statements of its forward, so that a class that computes anything else keeps its own.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_fast import linears, pointwise
from prefix_fast.models.stepped import Stepped

_GATED = "self.down_proj(self.act_fn(self.gate_proj({0})) * self.up_proj({0}))"
_GATED_FORMS = (f"return {_GATED}", f"down_proj = {_GATED}\nreturn down_proj")
_NORM_FORM = """input_dtype = {0}.dtype
{0} = {0}.to(torch.float32)
variance = {0}.pow(2).mean(-1, keepdim=True)
{0} = {0} * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * {0}.to(input_dtype)"""
_OFFSET_NORM_FORM = """output = self._norm({0}.float())
output = output * (1.0 + self.weight.float())
return output.type_as({0})"""
_OFFSET_NORM_INNER = "return {0} * torch.rsqrt({0}.pow(2).mean(-1, keepdim=True) + self.eps)"


class FusedGELU(Stepped):
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not _may_replace(args, kwargs) or not isinstance(args[0], Tensor):
            return forward(self, *args, **kwargs)
        out = pointwise.gated_unit(args[0], None, "gelu_tanh")
        return F.gelu(args[0], approximate="tanh") if out is None else out


class GatedMLP(Stepped):
    """down(act(gate(x)) · up(x))."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not _may_replace(args, kwargs) or linears.is_watched(self.act_fn):
            return forward(self, *args, **kwargs)
        activation = _activations().get(getattr(type(self.act_fn), "_prefix_fast_class", type(self.act_fn)))
        if activation is None:
            return forward(self, *args, **kwargs)
        gate, up = self.gate_proj(args[0]), self.up_proj(args[0])
        out = pointwise.gated_unit(gate, up, activation)
        return self.down_proj(self.act_fn(gate) * up if out is None else out)


class FrozenRMSNorm(Stepped):
    """weight · x · rsqrt(mean x² + eps)."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = _norm(self, args, kwargs, self.variance_epsilon, 0.0)
        return forward(self, *args, **kwargs) if out is None else out


class FrozenOffsetRMSNorm(Stepped):
    """(1 + weight) · x · rsqrt(mean x² + eps)."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = _norm(self, args, kwargs, self.eps, 1.0)
        return forward(self, *args, **kwargs) if out is None else out


def _norm(module: Any, args: tuple, kwargs: dict[str, Any], eps: float, offset: float) -> Tensor | None:
    return pointwise.rms_norm(args[0], module.weight, eps, offset) if _may_replace(args, kwargs) else None


def mixin_of(module: nn.Module) -> type[Stepped] | None:
    """What computes a module of this class in one operator; None: nothing here does."""
    own_class: Any = type(module)
    return _mixin_of(own_class)


@functools.cache
def _mixin_of(cls: Any) -> type[Stepped] | None:
    from transformers.activations import FastGELUActivation, NewGELUActivation

    if cls in (NewGELUActivation, FastGELUActivation):
        return FusedGELU
    if _has_form(cls.forward, *_GATED_FORMS):
        return GatedMLP
    if _has_form(cls.forward, _NORM_FORM):
        return FrozenRMSNorm
    if _has_form(cls.forward, _OFFSET_NORM_FORM) and _has_form(getattr(cls, "_norm", None), _OFFSET_NORM_INNER):
        return FrozenOffsetRMSNorm
    return None


def _has_form(method: Any, *forms: str) -> bool:
    """Whether a method with one argument has these statements and no others."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    text = "\n".join(
        ast.unparse(statement)
        for statement in function.body
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    )
    return any(text == form.format(function.args.args[1].arg) for form in forms)


@functools.cache
def _activations() -> dict[Any, str]:
    from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

    return {
        **dict.fromkeys((SiLUActivation, nn.SiLU), "silu"),
        **dict.fromkeys((GELUTanh, NewGELUActivation, FastGELUActivation), "gelu_tanh"),
    }


def _may_replace(args: tuple, kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and linears.choice() != "0"
