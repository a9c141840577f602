"""Which modules of a patched model compute otherwise while it is frozen: linear layers, and chains of `pointwise`.

The module's class steps aside as the model's does (see `hosts`); all that it remembers is the dtype in which it is to
compute, if that is not its weight's, so copies and pickles are as ever. Every call looks whether it still may: a weight
that is trained again, another device or dtype, other autocast and torch.compile run the class's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prefix_fast import half, linears
from prefix_fast.models import hosts, pointwise
from prefix_fast.models.stepped import Stepped

LEAST_WEIGHT = 2**16  # elements; the product with a smaller weight takes no longer than the choice


class FrozenLinear(Stepped):
    """nn.Linear: y = x · Wᵀ + b."""

    _transposed = False

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            dtype, weight, bias = half.operands_of(self)
            x = args[0] if dtype is None else args[0].to(dtype)
            out = linears.frozen_linear(x, weight, bias, self._transposed)
            if out is None and dtype is not None:
                out = F.linear(x, weight.t() if self._transposed else weight, bias)
            if out is not None:
                return out
        return forward(self, *args, **kwargs)


class FrozenConv1D(FrozenLinear):
    """GPT-2's Conv1D: y = x · W + b."""

    _transposed = True


def step_in(model: Any, compute_dtype: torch.dtype | None = None) -> None:
    """Let the frozen parts of a patched model compute in their faster way; the prefix is not among them.

    Args:
        model: patched.
        compute_dtype: in which it computes under autocast, where that is not its weights'.
    """
    step_out(model)
    if linears.choice() == "0":
        return
    parts: list[Any] = list(_own_modules(model))
    frozen = not any(parameter.requires_grad for part in parts for parameter in part.parameters(recurse=False))
    dtypes: set[torch.dtype] = set()
    for module in parts:
        own_class: Any = type(module)
        mixin: Any = _mixins().get(own_class) or pointwise.mixin_of(module)
        if mixin is None or linears.is_watched(module):
            continue
        if issubclass(mixin, FrozenLinear):
            if not _can_step_in(module, compute_dtype):
                continue
            if compute_dtype is not None:
                module.__dict__[half.MARK] = compute_dtype
            if module.weight.is_cpu:
                dtypes |= {compute_dtype or module.weight.dtype} & set(linears.DTYPES)
        elif not frozen:
            continue
        module.__class__ = hosts.patched_class(own_class, mixin)
    linears.decide(linears.products_of(sorted(dtypes, key=str)))


def step_out(model: Any) -> None:
    """Give those modules their own classes back."""
    for module in model.modules():
        if isinstance(module, Stepped) and hosts.is_patched(module):
            module.__class__ = type(module)._prefix_fast_class
            if module.__dict__.pop(half.MARK, None) is not None:
                half.forget(module.weight, module.bias)  # type: ignore[attr-defined]


@functools.cache
def _mixins() -> dict[Any, Any]:
    from transformers.pytorch_utils import Conv1D

    return {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}


def _can_step_in(module: Any, compute_dtype: torch.dtype | None) -> bool:
    parameters = [parameter for parameter in (module.weight, module.bias) if parameter is not None]
    return module.weight.numel() >= LEAST_WEIGHT and all(
        type(parameter) is nn.Parameter
        and (parameter.is_floating_point() if compute_dtype else parameter.is_cpu and parameter.dtype in linears.DTYPES)
        and not parameter.requires_grad
        for parameter in parameters
    )


def _own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules without the prefix and without those that PEFT has wrapped."""
    todo = [model]
    while todo:
        module = todo.pop()
        if any(cls.__module__.startswith("peft.tuners.") for cls in type(module).__mro__):
            continue
        yield module
        todo += [child for name, child in module.named_children() if module is not model or name != "prefix"]
