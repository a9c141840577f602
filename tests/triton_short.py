"""Calls that the fused backward of short prefixes serves; a program that needs TRITON_INTERPRET=1 before it starts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from triton_cases import DTYPES, Call, check, check_order, run
from triton_harness import Machine, failures_of, words

from prefix_fast.backends import triton, triton_short
from prefix_fast.backends.problem import Grads
from prefix_fast.testing import Case, make_problem, output_grads

BASE = Case(B=3, H=4, Hkv=2, Tq=37, Tk=37, P=5, D=16)  # two query tiles, with four heads of two groups
BANK = replace(BASE, B=4, H=2, Hkv=1, Tk=45, N=3, P=33, ids="random", lengths="random", D=32)  # rows without a prefix
SIZES = tuple(Call(replace(case, P=P, seed=P)) for case in (BASE, BANK) for P in (1, 5, 31, 32, 33, 64))
FLAGS = (
    Call(replace(BANK, dropout_p=0.3, key_mask="scattered"), hidden="nan"),
    Call(replace(BANK, attn_bias=True, options={"segment_bias": True, "softcap": 2.0}), bias="full-inf"),
    Call(replace(BANK, query_offset="rows", options={"window": 9, "in_window": True, "sinks": True})),
    Call(replace(BANK, is_causal=False, query_offset="int", options={"window": 20, "sinks": True}), hidden="inf"),
    Call(replace(BASE, H=8, Hkv=1, Tq=1, Tk=1, P=10, D=80, key_mask="left")),
    Call(replace(BASE, Tk=0, P=64, dropout_p=0.5, options={"softcap": 0.5})),
    Call(replace(BASE, D=128, P=17), plan=True, unwanted=("key", "value", "segment0.value"), grad_out="sum"),
    Call(replace(BANK, D=24), plan=True, unwanted=("segment0.key",), grad_lse=False),
    Call(
        replace(BANK, options={"scale": -0.2}), integers="strided", grad_out="permuted",
        layouts=(("query", "sliced"), ("key", "expanded1"), ("segment0.key", "permuted")),
    ),
)  # fmt: skip


@contextmanager
def fused(times: int) -> Iterator[None]:
    """Raise unless the fused kernel is launched so often within."""
    with mock.patch.object(
        triton_short, "queries_and_segments", side_effect=triton_short.queries_and_segments
    ) as launched:
        yield
    if launched.call_count != times:
        raise AssertionError(f"the fused kernel was launched {launched.call_count} times, expected {times}")


def agrees_with_the_oracle(dtype: str, call: Call) -> None:
    """Outputs poisoned, memory fenced, programs in a random order."""
    case = replace(call.case, dtype=DTYPES[dtype])
    if dtype == "fp16" and case.seed % 2:
        case = replace(case, prefix_dtype=torch.float32)
    with fused(1):
        check(replace(call, case=case), Machine(case.seed))


def has_the_same_bits_in_every_run(call: Call) -> None:
    """Ten runs, and programs in other orders."""
    with fused(2):
        check_order(call)
    results = [run(call, Machine(seed)) for seed in range(10)]
    for result in results[1:]:
        for name, tensor in result.items():
            if not torch.equal(words(tensor), words(results[0][name])):
                raise AssertionError(f"{name} differs from run to run")


def gives_rows_the_same_bits_in_any_order(case: Case) -> None:
    """The gradients of queries, with the rows of the batch reversed."""
    problem = make_problem(case)
    ids = torch.arange(case.B) % (case.N + 1) - 1
    problem = replace(problem, sets=(replace(problem.sets[0], ids=ids),))
    flipped = replace(
        problem, query=problem.query.flip(0), key=problem.key.flip(0), value=problem.value.flip(0),
        sets=(replace(problem.sets[0], ids=ids.flip(0)),),
    )  # fmt: skip
    grad_out, _ = output_grads(problem)
    found = []
    with fused(2):
        for given, grad in ((problem, grad_out), (flipped, grad_out.flip(0))):
            out, lse = torch.empty_like(given.query), torch.empty(given.query.shape[:-1])
            triton.forward(given, out, lse)
            grads = Grads(
                torch.full_like(given.query, torch.nan), None, None, ((torch.empty_like(given.sets[0].key), None),)
            )
            triton.backward(given, out, lse, grad, None, grads)
            found.append(grads.query)
    if not torch.equal(found[0], found[1].flip(0)):
        raise AssertionError("the gradient of a query depends on the order of the rows")


def other_calls_are_not_fused() -> None:
    """Two sets, packed rows, packed segments, long segments, a wide head dim; no gradient of queries, or of the set."""
    for call in (
        Call(replace(BASE, num_sets=2)), Call(replace(BASE, packed=True)), Call(replace(BASE, packed_segments=True)),
        Call(replace(BASE, P=65)), Call(replace(BASE, D=144)), Call(BASE, unwanted=("query",)),
        Call(BASE, unwanted=("segment0.key", "segment0.value")),
    ):  # fmt: skip
        with fused(0):
            check(call)


def main(arguments: list[str]) -> int:
    """Run one group of checks: "oracle" with a dtype, "bits", or "others". Returns the number of failures."""
    torch.set_num_threads(1)
    checks: dict[str, list[tuple[Callable[..., None], tuple[object, ...]]]] = {
        "oracle": [(agrees_with_the_oracle, (*arguments[1:], call)) for call in (*SIZES, *FLAGS)],
        "bits": [(has_the_same_bits_in_every_run, (Call(BANK),)), (gives_rows_the_same_bits_in_any_order, (BANK,))],
        "others": [(other_calls_are_not_fused, ())],
    }
    return failures_of(
        (f"{function.__name__}: {given}", partial(function, *given)) for function, given in checks[arguments[0]]
    )
