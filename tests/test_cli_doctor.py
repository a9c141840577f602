"""The doctor passes where every backend agrees with the oracle, and fails loudly where one does not."""

import contextlib

import pytest
import torch
from faked_cards import fake_cards, forget
from typer.testing import CliRunner

from prefix_fast import cli, dispatch, doctor, selfcheck, speed, testing, tuning
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_config import device_of, safe_tiles, tiles_for
from prefix_fast.backends.triton_vetting import Configuration, Kind


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


@pytest.mark.usefixtures("few_cases")
def test_doctor_says_in_one_line_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "Self-check of the Triton kernels: no CUDA or ROCm device here\n" in result.output


KINDS = [Kind(16, torch.bfloat16, "ieee", False), Kind(64, torch.bfloat16, "ieee", False)]


@pytest.fixture
def card(monkeypatch, few_cases, tmp_path):
    """A faked card on which dkv fails for a head dim of 64; the list of what is checked there."""
    pytest.importorskip("triton")
    checked = []

    def check(device, configuration, tile):
        checked.append((configuration, tile))
        wrong = configuration == Configuration("dkv", KINDS[1]) and tile != safe_tiles(64).dkv
        return "AssertionError: grad.key: 3e-01" if wrong else None

    fake_cards(monkeypatch, (9, 0))
    monkeypatch.setattr(selfcheck, "_failure", check)
    monkeypatch.setattr(selfcheck, "usual_kinds", lambda: KINDS)
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu"])
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
    forget()
    yield checked
    forget()


def lines_of(result, *words):
    return [line for line in result.output.splitlines() if all(word in line for word in words)]


def test_doctor_shows_the_tile_and_the_state_of_each_configuration(card):
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    table = tiles_for(device_of(0), 64, torch.bfloat16)
    assert lines_of(result, "forward-D64-bf16", f"{table.forward.queries}×{table.forward.keys}", "checked")
    assert lines_of(result, "dkv-D64-bf16", "32×32", "failed: safe tile used")
    assert lines_of(result, "dkv-D64-bf16 on cuda:0: AssertionError: grad.key: 3e-01")
    assert lines_of(result, "dkv-D16-bf16", "checked")


def test_doctor_renews_verdicts_only_when_asked(card):
    states = doctor.check_configurations()
    assert len(states) == len(selfcheck.configurations(KINDS)) and len(card) == len(states) + 1  # the safe tile of one
    card.clear()
    assert doctor.check_configurations() == states and card == []
    assert doctor.check_configurations(recheck=True) == states and len(card) == len(states) + 1
    card.clear()
    assert CliRunner().invoke(cli.app, ["doctor", "--recheck"]).exit_code == 0
    assert len(card) == len(states) + 1


@pytest.fixture
def clock(card, monkeypatch):
    """On the faked card the first neighbour of each tile takes half the time; the tiles that are timed."""
    timed = []

    def seconds_of(device, calls):
        timed.extend(call.args[0] for call in calls)
        return [1.0, 1.0, 0.5, *[1.0] * (len(calls) - 3)]

    monkeypatch.setattr(tuning, "_launcher", lambda *_: lambda tile: None)
    monkeypatch.setattr(tuning.tune, "__kwdefaults__", {"progress": None, "clock": seconds_of})
    monkeypatch.setattr(selfcheck, "defaults", lambda device, kind: contextlib.nullcontext())
    return timed


def test_doctor_tunes_only_when_asked_and_shows_the_tile(clock):
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0 and clock == []
    result = CliRunner().invoke(cli.app, ["doctor", "--tune"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    _, _, faster, *_ = triton_vetting.choices(0, Configuration("forward", KINDS[1]))
    assert lines_of(result, "forward-D64-bf16", f"{faster.queries}×{faster.keys}", "checked, tuned")
    assert lines_of(result, "dkv-D64-bf16", "failed: safe tile used")  # neighbours of a wrong tile are wrong here too
    count = len(clock)
    assert CliRunner().invoke(cli.app, ["doctor", "--tune"]).exit_code == 0 and len(clock) == count
    assert {state.state for state in doctor.check_configurations()} >= {"checked, tuned"}
    states = {state.state for state in doctor.check_configurations(recheck=True)}
    assert states == {"checked", "failed: safe tile used"}


@pytest.mark.usefixtures("few_cases")
def test_doctor_does_not_tune_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["doctor", "--tune"])
    assert result.exit_code == 2
    assert "expected a card to tune on, got none: no CUDA or ROCm device here; leave --tune out" in result.output


def test_doctor_checks_every_kind_only_when_asked(card):
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    assert {configuration.kind for configuration, _ in card} == set(KINDS)
    assert CliRunner().invoke(cli.app, ["doctor", "--all"]).exit_code == 0
    assert {configuration.kind for configuration, _ in card} == set(selfcheck.all_kinds())


def test_usual_kinds_are_those_of_the_present_precision(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    kinds = selfcheck.usual_kinds()
    assert {kind.block_d for kind in kinds} == {64, 128}
    assert {kind.precision for kind in kinds if kind.dtype == torch.float32} == {"tf32x3"}
    assert {kind.dtype for kind in kinds} == {torch.float32, torch.bfloat16, torch.float16}


def test_doctor_fails_where_a_kernel_is_wrong_with_every_tile(card, monkeypatch):
    monkeypatch.setattr(selfcheck, "_failure", lambda *_: "AssertionError: out: 3e-01")
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "140"})
    assert result.exit_code == 1
    assert lines_of(result, "forward-D64-bf16", "failed with every tile: refused")


def test_doctor_leaves_a_configuration_unchecked_where_memory_ran_out(card, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selfcheck, "_failure", full)
    states = doctor.check_configurations()
    assert {state.state for state in states} == {"unchecked: safe tile used"}
    assert {state.tile for state in states} <= set(safe_tiles(64))


def test_doctor_shows_why_an_old_card_is_refused(card, monkeypatch):
    fake_cards(monkeypatch, (7, 5))
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert lines_of(result, "cuda:0", "all", "refused: expected compute capability 8.0 or later, got 7.5 (Card 0)")
    assert card == []


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
