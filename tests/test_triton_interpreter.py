"""The Triton kernels under Triton's interpreter against the oracle; each run is a process that begins with it on."""

import importlib.util
from pathlib import Path

import pytest
from interpreted import run_cases, run_module

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SAMPLE = (0, 9, 24, 31, 60)  # of triton_mutants.MUTANTS


@pytest.mark.parametrize(("dtype", "first", "last"), [("fp32", 0, 12), ("fp16", 0, 12), ("bf16", 12, 15)])
def test_random_calls_agree_with_the_oracle(dtype: str, first: int, last: int, root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_cases", dtype, first, last)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("first", range(12, 232, 44))
def test_many_random_calls_agree_with_the_oracle(dtype: str, first: int, root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_cases", dtype, first, first + (44 if dtype != "bf16" else 8))


def test_random_calls_have_every_argument_often(root: Path) -> None:
    assert "0 rare kinds" in run_module(root, "triton_cases", "kinds")


def test_the_checks_see_kernels_that_break_their_rules(root: Path) -> None:
    assert "0 unseen" in run_module(root, "triton_faults")


@pytest.mark.parametrize("sample", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_each_result_shows_the_dropped_weights_of_philox(sample: str, root: Path) -> None:
    assert "0 differences" in run_module(root, "triton_dropout", sample)


def test_what_cannot_run_is_refused_before_a_launch(root: Path) -> None:
    assert "0 faults" in run_module(root, "triton_refusals")


def test_wrong_kernels_are_seen(root: Path) -> None:
    assert "0 survivors" in run_module(root, "triton_mutants", *SAMPLE)


@pytest.mark.slow
def test_every_wrong_kernel_is_seen(root: Path) -> None:
    assert "0 survivors" in run_module(root, "triton_mutants")


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_corner_cases_agree_with_the_oracle(dtype: str, root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_cases", dtype, "corners")


def test_offsets_beyond_int32_reach_the_same_numbers(root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_far", "rows", "key heads", "long rows", "bias keys")


@pytest.mark.slow
def test_all_offsets_beyond_int32_reach_the_same_numbers(root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_far")


def test_properties_of_the_operator_hold(root: Path) -> None:
    _properties(
        root, "triton and not budget and (leaks or unused or no_key or smallest or large) or bitwise or same_on"
    )


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["fp32", "half_precision", "not budget"])
def test_every_property_of_the_operator_holds(chosen: str, root: Path) -> None:
    _properties(root, f"({chosen}) and not reference")


def _properties(root: Path, chosen: str) -> None:
    run_cases(root, "test_operator_properties.py", chosen, "-p", "triton_harness")


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from prefix_fast import dispatch
    from prefix_fast.backends.problem import Facts

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = Facts("cpu", torch.float64, 300, ())
    reasons = " ".join(dispatch.unsupported_reasons("triton", facts))
    for part in ("not float64", "up to 256, not 300", "only with TRITON_INTERPRET=1"):
        assert part in reasons
