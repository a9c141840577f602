"""What the tests of the C++ kernels share: instruction sets, calls below the operator, poisoned results."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from prefix_fast.backends import native
from prefix_fast.backends.problem import Grads, Problem
from prefix_fast.testing import float_tensors, output_grads

AVAILABLE = native.available_isas()
# Every level, the ones that this CPU lacks as skips.
ISAS = [
    pytest.param(level, marks=[] if level in AVAILABLE else pytest.mark.skip(reason=f"this CPU cannot run {level}"))
    for level in native.LEVELS
]


def in_place(tensor: Tensor) -> Tensor:
    """Where a test does not say otherwise, results lie where PyTorch puts them."""
    return tensor


def run(
    problem: Problem,
    wanted: Iterable[str] | None = None,
    *,
    gradients: bool = True,
    place: Callable[[Tensor], Tensor] = in_place,
) -> dict[str, Tensor]:
    """out, lse and `grad.<name>` of the wanted tensors (None: of all), from kernels that write into NaN.

    `place` copies what a call reads and writes beside the problem's tensors to where the test wants it.
    """
    out = place(torch.full_like(problem.query, torch.nan))
    lse = place(torch.full(problem.query.shape[:-1], torch.nan))
    native.forward(problem, out, lse)
    results = {"out": out, "lse": lse}
    return results | differentiate(problem, out, lse, wanted, place) if gradients else results


def differentiate(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    wanted: Iterable[str] | None = None,
    place: Callable[[Tensor], Tensor] = in_place,
) -> dict[str, Tensor]:
    """The wanted gradients alone, for given results of the forward."""
    tensors = float_tensors(problem)
    names = set(tensors if wanted is None else wanted)
    filled = {
        name: place(torch.full(t.shape, torch.nan, dtype=t.dtype)) if name in names else None
        for name, t in tensors.items()
    }
    of_sets = tuple((filled[f"segment{i}.key"], filled[f"segment{i}.value"]) for i in range(len(problem.sets)))
    grad_out, grad_lse = (place(grad) for grad in output_grads(problem))
    grads = Grads(filled["query"], filled["key"], filled["value"], of_sets)
    native.backward(problem, out, lse, grad_out, grad_lse, grads)
    return {f"grad.{name}": tensor for name, tensor in filled.items() if tensor is not None}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every result that `expected` has, bit for bit."""
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differs"
