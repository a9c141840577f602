"""The doctor passes where every backend agrees with the oracle, and fails loudly where one does not."""

import pytest
import torch
from typer.testing import CliRunner

from prefix_fast import cli, dispatch, doctor, speed, testing


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(doctor, "CASES", doctor.CASES[:2])
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))


@pytest.mark.usefixtures("few_cases")
def test_doctor_checks_every_available_backend():
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    for info in dispatch.backends():
        assert info.name in result.output
    assert "Every available backend agrees with the oracle." in result.output
    checked = {check.backend for check in doctor.check_backends()}
    assert checked == {info.name for info in dispatch.backends() if info.available}


@pytest.mark.usefixtures("few_cases")
def test_doctor_exits_with_1_and_names_the_failing_case(monkeypatch):
    def wrong(problem, backend, *, gradients=True):
        raise AssertionError("out: 1.00e+00 (budget 1.00e-06)")

    monkeypatch.setattr(testing, "check", wrong)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "reference on cpu" in result.output and str(doctor.CASES[0]) in result.output
    assert "budget 1.00e-06" in result.output


def test_doctor_reports_a_crashing_backend(monkeypatch):
    def crash(problem, backend, *, gradients=True):
        raise RuntimeError("illegal instruction set")

    monkeypatch.setattr(testing, "check", crash)
    for check in doctor.check_backends():
        assert check.passed == 0 and all("illegal instruction set" in failure for failure in check.failures)


def test_doctor_cases_cover_what_users_call():
    assert {case.key_mask for case in doctor.CASES} >= {"none", "left", "right"}
    assert any(case.ids == "random" for case in doctor.CASES) and any(case.packed for case in doctor.CASES)
    assert any(case.Hkv != case.H for case in doctor.CASES) and any(case.Tq == 1 for case in doctor.CASES)


def test_bench_measures_after_a_parity_check():
    (measurement,) = speed.measure([speed.Shape(B=2, H=2, T=9, P=5, D=16)], repeats=2)
    assert measurement.difference < 1e-4 and measurement.ours > 0 and measurement.rival > 0
    assert measurement.ratio == pytest.approx(measurement.rival / measurement.ours)


def test_bench_refuses_to_time_unequal_results(monkeypatch):
    exact = speed.concatenation_attention
    monkeypatch.setattr(speed, "concatenation_attention", lambda *leaves: exact(*leaves) * 1.01)
    with pytest.raises(ArithmeticError, match=r"bench: expected equal results within 0\.0001 at B2 H2 T9 P5 D16, got"):
        list(speed.measure([speed.Shape(B=2, H=2, T=9, P=5, D=16)], repeats=1))


def test_bench_prints_a_table(monkeypatch):
    monkeypatch.setattr(speed.measure, "__defaults__", ((speed.Shape(B=2, H=2, T=9, P=5, D=16),),))
    result = CliRunner().invoke(cli.app, ["bench", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert "B2 H2 T9 P5 D16" in result.output and "×" in result.output
