"""The split forward under Triton's interpreter; `test_triton_split.py` runs this file in a process that begins so."""

from dataclasses import replace

import pytest
import torch
from triton_harness import Machine, words

from prefix_fast import testing
from prefix_fast.backends import triton, triton_forward
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_cost import Split
from prefix_fast.backends.triton_vetting import Trial
from prefix_fast.testing import Case, make_problem

CASES = [
    Case(B=5, H=4, Hkv=2, Tq=1, Tk=70, P=100, N=3, ids="random", lengths="random", key_mask="left", D=32),
    Case(B=4, H=3, Hkv=1, Tq=2, Tk=40, P=70, N=2, ids="random", num_sets=2, query_offset="rows", D=24,
         options={"window": 50, "in_window": True, "sinks": True}),
    Case(B=3, H=8, Hkv=1, Tq=2, Tk=33, P=100, N=3, ids="random", packed_segments=True, dropout_p=0.4),
    Case(B=3, H=2, Hkv=2, Tq=8, Tk=8, P=70, attn_bias=True, options={"softcap": 2.0, "segment_bias": True}),
    Case(B=3, Tq=3, Tk=3, P=70, dtype=torch.float16, prefix_dtype=torch.float32),
    Case(B=2, Tq=2, Tk=0, P=0),
]  # fmt: skip


def run_fenced(problem):
    """out and lse; all memory but the inputs, partial results too, holds NaN before, and programs run in any order."""
    machine = Machine(3)
    out = machine.uninitialised(problem.query, "out")
    lse = machine.uninitialised(problem.query[..., 0].contiguous(), "lse", torch.float32)
    with machine.running():
        triton.forward(problem, out, lse)
    machine.assert_intact()
    return {"out": out, "lse": lse}


def run(problem, trial=None):
    """out and lse, quicker."""
    out = torch.full_like(problem.query, torch.nan)
    lse = torch.full(problem.query.shape[:-1], torch.nan)
    triton.forward(problem, out, lse, trial)
    return {"out": out, "lse": lse}


DIVISIONS = [(16, 16, 1), (32, 16, 3), (64, 32, 2), (16, 64, 5)]


@pytest.fixture(params=DIVISIONS, ids=lambda d: f"Q{d[0]}-own{d[1]}-chunks{d[2]}")
def split(request, monkeypatch):
    """Every call is divided so: queries of a tile, of a row's own, chunks of every set."""
    queries, own, chunks = request.param
    monkeypatch.setattr(
        triton_forward, "choose_split", lambda call, tiles: Split(queries, own, (chunks,) * len(call.sizes))
    )


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_the_budget_for_any_division(case):
    problem = make_problem(case)
    testing.compare(problem, "triton", run_fenced(problem), testing.truth(problem))


def rows_of(problem, index):
    """The call made of the given rows, in that order."""
    sets = tuple(replace(s, ids=s.ids[index]) for s in problem.sets)
    rows = {name: getattr(problem, name)[index] for name in ("query", "key", "value")}
    mask, offset = problem.key_mask, problem.query_offset
    return replace(
        problem, **rows, sets=sets, key_mask=None if mask is None else mask[index],
        query_offset=None if offset is None else offset[index],
    )  # fmt: skip


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_row_has_the_same_bits_alone_in_any_order_and_in_any_company(case):
    problem = make_problem(case)
    sets = tuple(replace(s, ids=torch.arange(case.B) % (case.N + 1) - 1) for s in problem.sets)
    problem = replace(problem, sets=sets)
    base = run(problem)
    order = torch.randperm(case.B, generator=torch.Generator().manual_seed(1))
    shuffled = run(rows_of(problem, order))
    alone = run(
        replace(problem, sets=tuple(replace(s, ids=torch.where(torch.arange(case.B) == 1, s.ids, -1)) for s in sets))
    )
    crowd = run(replace(problem, sets=tuple(replace(s, ids=s.ids[1].expand(case.B).clone()) for s in sets)))
    for name, result in base.items():
        assert torch.equal(words(shuffled[name]), words(result[order].contiguous())), name
        for other in (alone, crowd):
            assert torch.equal(words(other[name][1].contiguous()), words(result[1].contiguous())), name


def test_readers_at_other_places_in_the_window_change_no_bit():
    """Readers of one segment see different parts of it: each has the bits that it has among readers like itself."""
    case = Case(B=4, Tq=2, Tk=2, P=128, D=16, options={"window": 40, "in_window": True})
    problem = replace(make_problem(case), query_offset=torch.tensor([0, 30, -60, 90]))
    trial = Trial("split", Tile(64, 32, 1, 1))
    base = run(problem, trial)
    for row in range(case.B):
        offsets = torch.full((case.B,), int(problem.query_offset[row]))
        alike = run(replace(problem, query_offset=offsets), trial)
        for name in base:
            assert torch.equal(words(alike[name][row].contiguous()), words(base[name][row].contiguous())), name
