"""Which instruction set runs, what a forced one that cannot run says, and what the backend refuses."""

import pytest
import torch
from native_inputs import AVAILABLE, ISAS, run

import prefix_fast
from prefix_fast.backends import native
from prefix_fast.backends.problem import Facts
from prefix_fast.testing import Case, make_problem

PLAIN = Facts("cpu", torch.float32, 64, ())


def test_the_best_available_level_is_chosen(monkeypatch):
    monkeypatch.delenv("PREFIX_FAST_CPU_ISA", raising=False)
    assert native.chosen_isa() == AVAILABLE[-1]
    assert AVAILABLE[0] == "generic"


@pytest.mark.parametrize("isa", ISAS)
def test_a_forced_level_runs(isa, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    assert native.chosen_isa() == isa
    assert native.availability() is None
    assert run(make_problem(Case()))["out"].isfinite().all()


@pytest.mark.parametrize(
    ("level", "reason"),
    [("sse9", "expected one of generic, avx2, avx512, avx512_bf16"), ("amx", "expected one of generic")],
)
def test_a_forced_level_that_cannot_run_raises_with_the_reason(level, reason, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", level)
    query = torch.randn(1, 2, 3, 4)
    message = f"PREFIX_FAST_CPU_ISA={level}: .*{reason}.*available here: generic"
    for call in (native.chosen_isa, lambda: native.forward(make_problem(Case()), query, query)):
        with pytest.raises(NotImplementedError, match=message):
            call()
    assert reason in native.availability()
    with pytest.raises(NotImplementedError, match=reason):
        prefix_fast.prefix_attention(query, query, query, query[:1], query[:1], backend="cpu")


def test_a_level_that_the_cpu_lacks_raises_with_what_it_has(monkeypatch):
    monkeypatch.setattr(native, "available_isas", lambda: ["generic"])
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", "avx2")
    with pytest.raises(NotImplementedError, match=r"PREFIX_FAST_CPU_ISA=avx2: this .*; available here: generic"):
        native.chosen_isa()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (PLAIN._replace(dtype=torch.float64), "the cpu backend takes float32, bfloat16 and float16, not float64"),
        (PLAIN._replace(device="cuda"), "the cpu backend takes cpu tensors, not cuda"),
    ],
    ids=["float64", "cuda"],
)
def test_what_is_not_served_has_a_reason(facts, reason):
    assert native.unsupported_reasons(facts) == [reason]


def test_everything_else_is_served():
    uses = ("softcap", "window", "sinks", "segment_bias", "dropout", "packed", "mixed_prefix")
    for dtype in native.DTYPES:
        assert native.unsupported_reasons(PLAIN._replace(dtype=dtype, uses=uses)) == []


def test_description_names_the_instruction_set_and_the_threads(monkeypatch):
    monkeypatch.delenv("PREFIX_FAST_CPU_ISA", raising=False)
    torch.set_num_threads(3)
    described = native.description()
    assert described["instruction set"] == AVAILABLE[-1]
    assert described["available"] == ", ".join(AVAILABLE)
    assert described["threads"] == ("3" if described["openmp"] == "yes" else "1")
