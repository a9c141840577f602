"""Calls to the Triton kernels under their interpreter: random ones, and what must hold of the results of each.

Run as a program, with TRITON_INTERPRET=1 in the environment before it starts, it checks the calls that it is given.
"""

import sys
from dataclasses import replace
from functools import partial

import random_calls
import torch
from random_calls import Call, check_results, gradients_of, outputs_of, placed, problem_of, rare_kinds
from torch import Tensor
from triton_harness import Machine, failures_of, words

from prefix_fast.backends import triton
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_vetting import Trial

PATHS = (
    None, Trial("few", Tile(16, 32, 1, 1)), *(Trial("split", Tile(queries, 32, 1, 1)) for queries in (16, 32, 64)),
)  # fmt: skip
APART = Trial("dkv", Tile(32, 32, 1, 1))
KINDS = random_calls.KINDS | {"split": lambda call: call.path is not None and call.path.kernel == "split"}


def random_call(seed: int, dtype: torch.dtype) -> Call:
    """A random call whose forward kernel and tile are chosen too; None: the cost model's choice."""
    return random_calls.random_call(seed, dtype, PATHS)


CORNERS = tuple(replace(call, path=PATHS[2]) if call.path == "split" else call for call in random_calls.CORNERS)


def run(call: Call, machine: Machine) -> dict[str, Tensor]:
    """out, lse and every wanted gradient from the kernels, on the CPU."""
    plain = problem_of(call)
    problem = placed(call, plain, machine)
    grad_out, grad_lse = gradients_of(call, plain)
    layout = call.grad_out if call.grad_out in ("sliced", "permuted") else "dense"
    grad_out = machine.input(grad_out, "grad_out", layout)
    given_lse = machine.input(grad_lse, "grad_lse") if call.grad_lse else None
    out, lse, grads, wanted = outputs_of(call, plain, machine)
    with machine.running():
        triton.forward(problem, out, lse, call.path)
        triton.backward(problem, out, lse, grad_out, given_lse, wanted, APART if call.apart else None)
    machine.assert_intact()
    results = {"out": out, "lse": lse, **{f"grad.{name}": grad for name, grad in grads.items() if grad is not None}}
    return {name: result.cpu() for name, result in results.items()}


def check(call: Call, machine: Machine | None = None) -> None:
    """Compare one call with the float64 truth."""
    check_results(call, "triton", run(call, machine or Machine(0)))


def check_order(call: Call) -> None:
    """Whatever the order of the programs, the results have the same bits."""
    in_order, shuffled = run(call, Machine()), run(call, Machine(call.case.seed + 1))
    for name, result in in_order.items():
        if not torch.equal(words(result), words(shuffled[name])):
            raise AssertionError(f"{name} depends on the order of the programs")


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: list[str]) -> int:
    """Check the random calls of a dtype and seeds [first, last); print the failures by id. Returns their number.

    Instead of seeds, "corners" stands for those; "kinds" as the only argument counts what the calls have.
    """
    torch.set_num_threads(1)
    if arguments == ["kinds"]:
        rare = rare_kinds([random_call(seed, torch.float16) for seed in range(232)], KINDS, least=8)
        print(*rare, f"{len(rare)} rare kinds", sep="\n")
        return len(rare)
    dtype = DTYPES[arguments[0]]
    if arguments[1:] == ["corners"]:
        calls = [replace(call, case=replace(call.case, dtype=dtype)) for call in CORNERS]
    else:
        calls = [random_call(seed, dtype) for seed in range(int(arguments[1]), int(arguments[2]))]
    return failures_of((f"seed {call.case.seed}: {call}", partial(_check_of_seed, call)) for call in calls)


def _check_of_seed(call: Call) -> None:
    """The call; for some seeds the order of the programs too."""
    check(call, Machine(call.case.seed))
    if call.case.seed % 8 == 0:
        check_order(call)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
