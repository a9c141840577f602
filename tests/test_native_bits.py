"""Bits: the same for any number of threads, any neighbours in the batch, any order of rows, any run."""

from dataclasses import replace

import pytest
import torch
from native_inputs import ISAS, assert_same_bits, run

from prefix_fast.testing import Case, float_tensors, make_problem, with_float_tensors

SLIDING = {"window": 150, "in_window": True, "softcap": 3.0, "sinks": True}
# Row-major, segment-major with and without the kernel for few queries, head dims that are no whole vectors.
CASES = [
    Case(B=6, H=4, Hkv=2, Tq=70, Tk=70, P=130, D=32, N=3, ids="random", lengths="random", key_mask="left"),
    Case(B=6, H=2, Hkv=2, Tq=9, Tk=40, P=300, D=17, N=2, ids="random", key_mask="scattered", num_sets=2),
    Case(B=40, H=4, Hkv=2, Tq=1, Tk=30, P=300, D=64, N=2, ids="random", lengths="random"),
    Case(B=6, H=2, Hkv=2, Tq=100, Tk=100, P=40, D=16, dtype=torch.bfloat16, dropout_p=0.2),
    Case(B=9, H=4, Hkv=2, Tq=3, Tk=40, P=300, D=64, N=2, ids="random", lengths="random", options=SLIDING),
    Case(B=9, H=2, Hkv=1, Tq=17, Tk=40, P=300, D=32, N=2, ids="random", key_mask="scattered", options=SLIDING,
         dtype=torch.bfloat16),
    Case(B=5, H=2, Hkv=2, Tq=150, Tk=170, P=70, D=32, N=2, ids="random", key_mask="left", num_sets=2,
         options={**SLIDING, "window": 65, "segment_bias": True}),
]  # fmt: skip
OF_ROWS = [case for case in CASES if not case.dropout_p]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", request.param)
    return request.param


def rows_of(problem, index):
    """The call made of the given rows; a dense problem without dropout."""
    named = float_tensors(problem)
    named |= {name: named[name][index] for name in ("query", "key", "value")}
    sets = tuple(replace(s, ids=None if s.ids is None else s.ids[index]) for s in problem.sets)
    mask = None if problem.key_mask is None else problem.key_mask[index]
    return replace(with_float_tensors(replace(problem, sets=sets), named), key_mask=mask)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_threads(case):
    problem = make_problem(case)
    torch.set_num_threads(1)
    expected = run(problem)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(run(problem), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_the_same_in_ten_runs(case):
    problem = make_problem(case)
    torch.set_num_threads(4)
    expected = run(problem)
    for _ in range(9):
        assert_same_bits(run(problem), expected)


@pytest.mark.parametrize("case", OF_ROWS, ids=str)
def test_permuting_rows_permutes_results(case, monkeypatch):
    problem = make_problem(case)
    order = torch.randperm(case.B, generator=torch.Generator().manual_seed(3))
    expected, found = run_with_row_grads(problem, monkeypatch), None
    found = run_with_row_grads(rows_of(problem, order), monkeypatch, order)
    for name in ("out", "lse", "grad.query", "grad.key", "grad.value"):
        assert torch.equal(found[name], expected[name][order]), name


@pytest.mark.parametrize("case", OF_ROWS, ids=str)
def test_a_row_does_not_see_its_neighbours(case, monkeypatch):
    """Row 2 keeps its bits when every other row brings other tokens, ids, masks, and NaN."""
    problem, other = make_problem(case), make_problem(replace(case, seed=1))
    keep = torch.arange(case.B) == 2
    mixed = {name: tensor.clone() for name, tensor in float_tensors(problem).items()}
    for name in ("query", "key", "value"):
        mixed[name][~keep] = float_tensors(other)[name][~keep]
        mixed[name][0] = torch.nan
    sets = tuple(replace(s, ids=torch.where(keep, s.ids, o.ids)) for s, o in zip(problem.sets, other.sets, strict=True))
    mask = None if problem.key_mask is None else torch.where(keep[:, None], problem.key_mask, other.key_mask)
    changed = with_float_tensors(replace(problem, sets=sets, key_mask=mask), mixed)
    expected, found = run_with_row_grads(problem, monkeypatch), run_with_row_grads(changed, monkeypatch)
    for name in ("out", "lse", "grad.query", "grad.key", "grad.value"):
        assert torch.equal(found[name][2], expected[name][2]), name


def run_with_row_grads(problem, monkeypatch, order=None):
    """`run`, with the output's gradients permuted like the rows."""
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(problem.query.shape, generator=generator).to(problem.query.dtype)
    grad_lse = torch.randn(problem.query.shape[:-1], generator=generator)
    if order is not None:
        grad_out, grad_lse = grad_out[order], grad_lse[order]
    monkeypatch.setattr("native_inputs.output_grads", lambda _: (grad_out, grad_lse))
    return run(problem)


def test_a_masked_tail_changes_no_bits():
    """Keys that a row does not see are as good as absent, at whatever place of a tile they stand."""
    problem = make_problem(Case(B=2, H=2, Hkv=2, Tq=40, Tk=200, P=20, D=32, is_causal=False))
    seen = 75
    mask = (torch.arange(200) < seen).expand(2, -1)
    short = replace(problem, key=problem.key[:, :, :seen], value=problem.value[:, :, :seen])
    found, expected = run(replace(problem, key_mask=mask)), run(short)
    assert_same_bits({name: found[name] for name in ("out", "lse", "grad.query")},
                     {name: expected[name] for name in ("out", "lse", "grad.query")})  # fmt: skip
    for name in ("grad.key", "grad.value"):
        assert torch.equal(found[name][:, :, :seen], expected[name])
        assert not found[name][:, :, seen:].any()
