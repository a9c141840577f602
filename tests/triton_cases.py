"""Calls to the Triton kernels under their interpreter: cases, and results written into NaN between canaries.

Run as a program, with TRITON_INTERPRET=1 in the environment before it starts, it checks the cases that it is given.
"""

import random
import sys

import torch
from torch import Tensor

from prefix_fast import testing
from prefix_fast.backends import triton
from prefix_fast.backends.problem import Grads, Problem
from prefix_fast.testing import Case, float_tensors, make_problem, output_grads, truth

CANARY = 12288.0  # a float16 too
MARGIN = 64


def random_case(seed: int) -> Case:
    """A case for every kind of call, chosen by the seed alone."""
    choose = random.Random(seed)
    group = choose.choice([1, 1, 2, 3, 4, 8, 16])
    packed = choose.random() < 0.2
    tokens = [0, 1, 5, 17, 31, 32, 33, 49]
    Tq = choose.choice(tokens[1:])
    num_sets, N = choose.choice([0, 1, 1, 1, 2, 3]), choose.choice([1, 1, 3])
    options = {}
    if choose.random() < 0.2:
        options["softcap"] = choose.choice([0.5, 2.0, 30.0])
    if choose.random() < 0.25:
        options["window"] = choose.choice([1, 4, 33])
        options["in_window"] = choose.random() < 0.5
    if choose.random() < 0.2:
        options["sinks"] = True
    if choose.random() < 0.15:
        options["scale"] = choose.choice([0.0, -0.2, 0.7])
    packed_segments = choose.random() < 0.2
    if not packed and not packed_segments and choose.random() < 0.15:
        options["segment_bias"] = True
    return Case(
        B=choose.choice([1, 2, 3]), H=group, Hkv=1, Tq=Tq,
        Tk=choose.choice([Tq, Tq, choose.choice(tokens)]), N=N, P=choose.choice([0, 1, 9, 31, 32, 33, 40]),
        D=choose.choice([16, 32, 64, 64, 80, 96, 128, 256]),
        dtype=choose.choice([torch.float32, torch.float16]), num_sets=num_sets, packed=packed,
        packed_segments=packed_segments, ids="random" if N > 1 or choose.random() < 0.3 else "none",
        lengths=choose.choice(["none", "random"]),
        key_mask="none" if packed else choose.choice(["none", "none", "left", "right", "scattered"]),
        attn_bias=not packed and choose.random() < 0.15, is_causal=choose.random() < 0.75,
        query_offset=choose.choice(["none", "none", "int", "rows"]),
        dropout_p=choose.choice([0.0, 0.0, 0.0, 0.3]), options=options, seed=seed,
    )  # fmt: skip


def guarded(like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A tensor of that shape and those strides full of NaN, and the memory around it, which nothing may write."""
    dtype = dtype or like.dtype
    dense = torch.empty_like(like, dtype=dtype)
    memory = torch.full((dense.numel() + 2 * MARGIN,), CANARY, dtype=dtype)
    inner = memory[MARGIN : MARGIN + dense.numel()]
    inner.fill_(torch.nan)
    return inner.as_strided(dense.shape, dense.stride()), memory


def run(problem: Problem) -> dict[str, Tensor]:
    """out, lse and every gradient from the kernels; raises where a canary is gone."""
    memories = {}

    def target(name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor, memories[name] = guarded(like, dtype)
        return tensor

    grad_out, grad_lse = output_grads(problem)
    out = target("out", problem.query)
    lse = target("lse", problem.query[..., 0].contiguous(), torch.float32)
    triton.forward(problem, out, lse)
    grads = {name: target(f"grad.{name}", t) for name, t in float_tensors(problem).items()}
    of_sets = tuple((grads[f"segment{i}.key"], grads[f"segment{i}.value"]) for i in range(len(problem.sets)))
    triton.backward(
        problem, out, lse, grad_out, grad_lse.float(), Grads(grads["query"], grads["key"], grads["value"], of_sets)
    )
    for name, memory in memories.items():
        edges = torch.cat([memory[:MARGIN], memory[memory.numel() - MARGIN :]])
        if not bool((edges == CANARY).all()):
            raise AssertionError(f"a kernel wrote outside {name}")
    return {"out": out, "lse": lse, **{f"grad.{name}": grad for name, grad in grads.items()}}


def check(case: Case) -> None:
    """Compare one case with the float64 truth, within the budget of `prefix_fast.testing`."""
    problem = make_problem(case)
    testing.compare(problem, "triton", run(problem), truth(problem, output_grads(problem)))


def main(arguments: list[str]) -> int:
    """Check the random cases of the seeds [first, last); print the failures by id. Returns their number."""
    torch.set_num_threads(1)
    failures = 0
    for seed in range(int(arguments[0]), int(arguments[1])):
        case = random_case(seed)
        try:
            check(case)
        except Exception as error:
            failures += 1
            print(f"seed {seed}: {case}: {type(error).__name__}: {error}")
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
