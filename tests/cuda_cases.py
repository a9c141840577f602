"""Random calls to the CUDA kernels and their host code on the emulated machine, and what must hold of the results.

Run as a program it checks the random calls of a type of products and seeds [first, last); it prints failures and their
number.
"""

import functools
import importlib.util
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from cuda_compile import KERNELS, kernels_module
from cuda_harness import SHARED_LIMITS, CaughtError, Machine
from random_calls import Call, check_results, gradients_of, outputs_of, placed, problem_of, random_call
from torch import Tensor

from prefix_fast.backends.problem import Problem, make_plan

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
HEAD_DIMS = (64, 80, 128)  # that are compiled; a call's is the least that holds its own
ALL_HEAD_DIMS = (64, 80, 96, 128, 256)


class Library(NamedTuple):
    """A compiled module and its file."""

    module: ModuleType
    path: Path


@functools.cache
def load(path: Path) -> Library:
    """The module of a file that `kernels_module` made."""
    # pybind11 knows modules by their whole name, the loader a function of a library by the last part.
    spec = importlib.util.spec_from_file_location(f"{path.stem}.emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Library(module, path)


def call_of(seed: int, products: str, head_dims: Sequence[int] = HEAD_DIMS) -> Call:
    """The random call of a seed, with a head dim that the kernels serve.

    A logit of 1e4 has an error of 5 with factors of tf32: there scores stay small.
    """
    call = random_call(seed, DTYPES[products])
    case = replace(call.case, D=min(-(-call.case.D // 8) * 8, head_dims[-1]))
    return replace(call, case=case, scores="normal" if products == "tf32" else call.scores)


class Place:
    """Where a call runs, as csrc/cuda/bindings.cpp asks: a small device, so that small calls are divided."""

    stream = 0

    def __init__(self, machine: Machine, choose: random.Random) -> None:
        self.machine = machine
        self.multiprocessors = choose.choice([1, 2, 6, 132])
        self.least_chunk = choose.choice([16, 32, 64])
        self.least_tiles = choose.choice([1, 2, 4])
        self._counters: list[Tensor] = []

    def allocate(self, count: int) -> Tensor:
        """Scratch of so many bytes that holds nothing yet."""
        return self.machine.uninitialised(torch.empty(count, dtype=torch.uint8), "scratch")

    def counters(self, count: int) -> Tensor:
        """Integers that are zero before and after each launch."""
        self._counters.append(self.machine.writable(torch.zeros(count, dtype=torch.int32), "counters"))
        return self._counters[-1]

    def assert_counters_are_zero(self) -> None:
        """Raise where a launch has left a counter behind."""
        if any(bool(counters.any()) for counters in self._counters):
            raise AssertionError("counters are not zero after the launch")


def run(call: Call, library: Library, machine: Machine, tf32: bool = False) -> dict[str, Tensor]:
    """out, lse and every wanted gradient; raises what the machine's checks have found first.

    `machine.ran` are the names of the kernels.
    """
    plain = problem_of(call)
    problem = with_plans(placed(call, plain, machine), machine)
    grad_out, grad_lse = gradients_of(call, plain)
    layout = call.grad_out if call.grad_out in ("sliced", "permuted") else "dense"
    grad_out = machine.input(grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(), "grad_out", layout)
    given_lse = machine.input(grad_lse, "grad_lse") if call.grad_lse else None
    out, lse, grads, wanted = outputs_of(call, plain, machine)
    place = Place(machine, random.Random(call.case.seed))
    try:
        machine.ran = library.module.forward(problem, out, lse, place, tf32)
        machine.ran += " " + library.module.backward(problem, out, lse, grad_out, given_lse, wanted, place, tf32)
    except RuntimeError:
        machine.assert_clean()
        raise
    machine.assert_clean()
    place.assert_counters_are_zero()
    return {"out": out, "lse": lse, **{f"grad.{name}": grad for name, grad in grads.items() if grad is not None}}


def with_plans(problem: Problem, machine: Machine) -> Problem:
    """The kernels need a plan wherever there are ids; the backend makes those that a call has not."""

    def planned(index: int):
        s = problem.sets[index]
        plan = s.plan if s.plan is not None or s.ids is None else make_plan(s.ids, s.count)
        if plan is None:
            return s
        return replace(s, plan=type(plan)(*(machine.input(t, f"plan{index}") for t in plan)))

    return replace(problem, sets=tuple(map(planned, range(len(problem.sets)))))


def check(call: Call, library: Library, products: str, **settings: Any) -> str:
    """Run a call in an order of its own, on an architecture of its own, and compare it with the float64 truth.

    Returns the names of the kernels that ran.
    """
    choose = random.Random(call.case.seed)
    arch, resident = choose.choice(list(SHARED_LIMITS)), choose.choice([1, 1, 2, 3])
    machine = Machine(library.path, seed=call.case.seed, arch=arch, resident=resident, **settings)
    results = run(call, library, machine, products == "tf32")
    check_results(call, "cuda", results, products == "tf32")
    return machine.ran


def check_order(call: Call, library: Library, products: str) -> None:
    """Whatever the order of threads and blocks, the results have the same bits."""
    first, second = (
        run(call, library, Machine(library.path, seed=seed, arch=90, resident=1 + seed), products == "tf32")
        for seed in (0, 1)
    )
    for name, result in first.items():
        if not torch.equal(result.view(torch.uint8), second[name].view(torch.uint8)):
            raise AssertionError(f"{name} depends on the order of threads and blocks")


def check_conflicts(call: Call, library: Library, products: str) -> None:
    """The loops of both products read shared memory without bank conflicts."""
    machine = Machine(library.path, seed=call.case.seed, arch=90, traffic=True)
    run(call, library, machine, products == "tf32")
    of_products = {
        f"{name}:{n}"
        for name, first, last in (
            ("tiles.cuh", "void multiply_transposed", "}  // namespace"),
            ("sums.cuh", "void multiply_weights", "// use(column, values)"),
        )
        for n in _lines_between((KERNELS / name).read_text("utf-8").splitlines(), first, last)
    }
    for traffic in machine.traffic:
        if traffic.conflicts > 0 and not of_products.isdisjoint(traffic.lines):
            where = " < ".join(traffic.lines)
            raise CaughtError(
                "bank conflicts", f"{where}: {traffic.conflicts} passes too many of {traffic.shared_requests} requests"
            )


def _lines_between(text: list[str], first: str, last: str) -> range:
    begin = next(n for n, line in enumerate(text, 1) if first in line)
    return range(begin, next(n for n, line in enumerate(text, 1) if n > begin and line.startswith(last)))


def main(arguments: list[str]) -> int:
    """Check the random calls of a type; print the failures by seed. Returns their number."""
    torch.set_num_threads(1)
    products, first, last = arguments[0], int(arguments[1]), int(arguments[2])
    library = load(kernels_module(products, HEAD_DIMS))
    failures = 0
    for seed in range(first, last):
        call = call_of(seed, products)
        try:
            check(call, library, products)
        except Exception as error:
            failures += 1
            print(f"seed {seed}: {call}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
