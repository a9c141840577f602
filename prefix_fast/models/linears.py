"""Which modules of a patched model compute otherwise while it is frozen: linear layers, and GPT-2's chain of a GELU.

The module's class steps aside as the model's does (see `hosts`); it has nothing to remember, so copies and pickles are
as ever. Every call looks whether it still may: a weight that is trained again, another device or dtype, autocast and
torch.compile run the class's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_fast import linears
from prefix_fast.models import hosts

LEAST_WEIGHT = 2**16  # elements; the product with a smaller weight takes no longer than the choice
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stepped:
    """A module that computes otherwise than its class does."""

    _prefix_fast_class: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        return hosts._rebuild, (self._prefix_fast_class, hosts._mixin_of(type(self))), self.__dict__


class FrozenLinear(Stepped):
    """nn.Linear: y = x · Wᵀ + b."""

    _transposed = False

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            out = linears.frozen_linear(args[0], self.weight, self.bias, self._transposed)
            if out is not None:
                return out
        return forward(self, *args, **kwargs)


class FrozenConv1D(FrozenLinear):
    """GPT-2's Conv1D: y = x · W + b."""

    _transposed = True


class FusedGELU(Stepped):
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) in one pass."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and isinstance(args[0], Tensor) and linears.choice() != "0":
            return F.gelu(args[0], approximate="tanh")
        return forward(self, *args, **kwargs)


def step_in(model: Any) -> None:
    """Let the frozen parts of a patched model compute in their faster way; the prefix is not among them."""
    step_out(model)
    if linears.choice() == "0":
        return
    mixins = _mixins()
    parts: list[Any] = list(_own_modules(model))
    frozen = not any(parameter.requires_grad for part in parts for parameter in part.parameters(recurse=False))
    dtypes: set[torch.dtype] = set()
    for module in parts:
        own_class: Any = type(module)
        mixin = mixins.get(own_class)
        if mixin is None or "forward" in module.__dict__ or any(module.__dict__.get(hooks) for hooks in _HOOKS):
            continue
        if issubclass(mixin, FrozenLinear):
            if not _can_step_in(module):
                continue
            dtypes.add(module.weight.dtype)
        elif not frozen:
            continue
        module.__class__ = hosts.patched_class(own_class, mixin)
    linears.decide(linears.products_of(sorted(dtypes, key=str)))


def step_out(model: Any) -> None:
    """Give those modules their own classes back."""
    for module in model.modules():
        if isinstance(module, Stepped) and hosts.is_patched(module):
            module.__class__ = type(module)._prefix_fast_class


def _mixins() -> dict[Any, Any]:
    from transformers.activations import FastGELUActivation, NewGELUActivation
    from transformers.pytorch_utils import Conv1D

    return {
        nn.Linear: FrozenLinear,
        Conv1D: FrozenConv1D,
        NewGELUActivation: FusedGELU,
        FastGELUActivation: FusedGELU,
    }


def _can_step_in(module: Any) -> bool:
    parameters = [parameter for parameter in (module.weight, module.bias) if parameter is not None]
    return module.weight.numel() >= LEAST_WEIGHT and all(
        type(parameter) is nn.Parameter
        and parameter.is_cpu
        and parameter.dtype in linears.DTYPES
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
