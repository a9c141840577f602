"""Random calls through the C++ kernels of every instruction set: the float64 truth, exact zeros, no leak of poison."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import compare_large, visible_parts, with_large_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_inputs import ISAS, assert_same_bits
from torch import Tensor

from prefix_fast.backends.problem import Problem
from prefix_fast.testing import Case, compare, evaluate, float_tensors, make_problem, output_grads, truth
from prefix_fast.testing import with_float_tensors as replaced

HALF = [torch.bfloat16, torch.float16]
LENGTHS = st.integers(0, 140)
FEW = st.integers(1, 6)


@dataclass(frozen=True)
class Call:
    """A case and what it leaves open."""

    case: Case
    layout: str = "dense"  # of all tensors: "sliced" from larger ones full of NaN, or "expanded" along a dimension
    dim: int = 0  # the expanded one
    large: bool = False  # scores up to ±1e4
    holes: bool = False  # some of the biases are -inf


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Ragged sizes on both sides of blocks, tiles and vectors; few queries a row as often as many."""
    heads_kv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    packed, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float32, *HALF]))
    packed_segments = draw(st.booleans())
    options = {
        "window": draw(st.none() | st.integers(1, 200)),
        "in_window": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, None, 0.7, 5.0, 50.0])),
        "sinks": draw(st.booleans()),
        "segment_bias": not packed and not packed_segments and draw(st.booleans()),
    }
    case = Case(
        B=draw(st.integers(1, 12)),
        H=heads_kv * group,
        Hkv=heads_kv,
        Tq=draw(FEW | LENGTHS),
        Tk=draw(LENGTHS),
        N=draw(st.integers(1, 3)),
        P=draw(LENGTHS),
        D=draw(st.integers(1, 72) | st.sampled_from([80, 96, 128])),
        dtype=dtype,
        prefix_dtype=draw(st.sampled_from([None, torch.float32])) if dtype in HALF else None,
        num_sets=draw(st.integers(0, 2)),
        packed=packed,
        packed_segments=packed_segments,
        ids="random",
        lengths=draw(st.sampled_from(["none", "random"])),
        key_mask="none" if packed else draw(st.sampled_from(["none", "left", "right", "scattered"])),
        attn_bias=False if packed else draw(st.booleans()),
        is_causal=draw(st.booleans()),
        query_offset=draw(st.sampled_from(["none", "int", "rows"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        options=options,
        seed=draw(st.integers(0, 2**20)),
    )
    return Call(
        case=case,
        layout=draw(st.sampled_from(["dense", "dense", "sliced", "expanded"])),
        dim=draw(st.integers(0, 2)),
        large=draw(st.sampled_from([False, False, False, True])),
        holes=draw(st.booleans()),
    )


def laid_out(tensor: Tensor, call: Call) -> Tensor:
    """The tensor as the call's layout has it; an expanded one repeats its first slice."""
    if call.layout == "sliced":
        larger = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        return larger[tuple(slice(2, 2 + size) for size in tensor.shape)].copy_(tensor)
    if call.layout == "expanded" and call.dim < tensor.dim() - 1 and tensor.shape[call.dim] > 0:
        return tensor.narrow(call.dim, 0, 1).expand(tensor.shape)
    return tensor


def with_holes(bias: Tensor | None, generator: torch.Generator) -> Tensor | None:
    return None if bias is None else bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -torch.inf)


def mapped(problem: Problem, change: Callable[[str, Tensor], Tensor]) -> Problem:
    return replaced(problem, {name: change(name, t) for name, t in float_tensors(problem).items()})


def problem_of(call: Call) -> Problem:
    problem = make_problem(call.case)
    if call.large:  # a float32 key that eager PyTorch rounds to half precision would move such a logit by far
        problem = with_large_scores(mapped(problem, lambda _, t: t.to(call.case.dtype).to(t.dtype)))
    if call.holes:
        generator = torch.Generator().manual_seed(call.case.seed)
        sets = tuple(replace(s, bias=with_holes(s.bias, generator)) for s in problem.sets)
        problem = replace(problem, attn_bias=with_holes(problem.attn_bias, generator), sets=sets)
    return mapped(problem, lambda _, t: laid_out(t, call))


def check_call(call: Call) -> None:
    problem = problem_of(call)
    grads, visible = output_grads(problem), visible_parts(problem)
    results, true = evaluate(problem, "cpu", grads), truth(problem, grads)
    if call.large:
        compare_large(problem, "cpu", results, true, grads[0])
    else:
        compare(problem, "cpu", results, true, grads)
    for name, seen in visible.items():
        assert not results[f"grad.{name}"][~seen].any(), f"grad.{name} is not zero where no query reads {name}"
    empty = results["lse"] == -torch.inf
    assert not results["out"][empty].any()
    assert not results["grad.query"][empty].any()

    def poisoned(name: str, tensor: Tensor) -> Tensor:
        return tensor.masked_fill(~visible[name][..., None], torch.nan) if name in visible else tensor

    assert_same_bits(evaluate(mapped(problem, poisoned), "cpu", grads), results)


def fuzz(examples: int) -> settings:
    fixture = HealthCheck.function_scoped_fixture  # the environment is the same for all examples of a test
    return settings(max_examples=examples, deadline=None, suppress_health_check=[fixture], database=None)


@pytest.mark.parametrize("isa", ISAS)
@fuzz(25)
@given(call=calls())
def test_any_call_is_within_the_budget(isa: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    check_call(call)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@fuzz(500)
@given(call=calls())
def test_many_calls_are_within_the_budget(isa: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    check_call(call)
