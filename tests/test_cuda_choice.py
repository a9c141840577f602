"""Which of Triton's and CUDA's kernels "auto" takes on a card: checked, then measured or predicted."""

import contextlib
import io
import itertools
from types import SimpleNamespace

import pytest
import torch
from cuda_cards import HALF, fake_installation, forget
from rich.console import Console

from prefix_fast import dispatch, doctor_report, selfcheck, testing, tuning
from prefix_fast.backends import cuda, cuda_vetting, triton_vetting
from prefix_fast.backends.problem import Facts
from prefix_fast.testing import Case

KIND = cuda.kind_of_facts(HALF)
FEW = HALF._replace(few_queries=True)


@pytest.fixture
def both(monkeypatch, tmp_path):
    """A card on which both kernels run, and of which nothing is known; returns the card, which the test may change."""
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path / "cache"))
    forget()
    fake_installation(monkeypatch)
    triton = dispatch.ops.load_backend("triton")
    monkeypatch.setattr(triton, "availability", lambda: None)
    monkeypatch.setattr(triton, "unsupported_reasons", lambda facts: [])
    monkeypatch.setattr(selfcheck, "defaults", lambda device, kind: contextlib.nullcontext())
    yield torch.cuda.get_device_properties(0)
    forget()


def test_kernels_that_no_check_has_found_right_do_not_come_first(both):
    assert cuda_vetting.verdict_of(0, KIND) is None
    assert dispatch.choose("auto", *FEW) == "triton"


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (9, 0)])
def test_unmeasured_the_one_launch_of_a_decode_step_comes_first(both, monkeypatch, major, minor):
    both.major, both.minor = major, minor
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
    cuda_vetting.record_verdict(0, KIND, None)
    times = cuda_vetting.times_of(0, "few queries")
    assert not times.measured
    assert 0 < times.cuda < times.triton < 1e-3
    assert dispatch.choose("auto", *FEW) == "cuda"
    assert dispatch.choose("auto", *HALF) == "triton"
    assert dispatch.choose("triton", *FEW) == "triton"


def test_measured_times_decide_and_stay_for_other_processes(both):
    cuda_vetting.record_verdict(0, KIND, None)
    cuda_vetting.record_times(0, "few queries", triton=1e-5, cuda=2e-5)
    cuda_vetting.record_times(0, "many queries", triton=2e-3, cuda=1e-3)
    for _ in range(2):
        assert dispatch.choose("auto", *FEW) == "triton"
        assert dispatch.choose("auto", *HALF) == "cuda"
        assert cuda_vetting.times_of(0, "few queries") == (1e-5, 2e-5, True)
        forget()  # as another process


def test_what_is_known_of_one_card_driver_or_build_says_nothing_of_another(both, monkeypatch):
    cuda_vetting.record_verdict(0, KIND, None)
    cuda_vetting.record_times(0, "few queries", triton=1e-5, cuda=2e-5)
    both.name = "Another"
    forget()
    assert cuda_vetting.verdict_of(0, KIND) is None
    assert not cuda_vetting.times_of(0, "few queries").measured


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"environment": {}, "found": ""}', "[" * 100_000])
def test_a_damaged_record_is_no_record(both, text):
    cuda_vetting.record_verdict(0, KIND, None)
    cuda_vetting.record_times(0, "few queries", triton=1e-5, cuda=2e-5)
    for file in (triton_vetting.cache_folder() / "selfcheck").rglob("*.json"):
        file.write_text(text)
    forget()
    assert cuda_vetting.verdict_of(0, KIND) is None
    assert not cuda_vetting.times_of(0, "few queries").measured


def test_times_that_cannot_be_are_no_times(both):
    cuda_vetting.record_times(0, "few queries", triton=0.0, cuda=2e-5)
    forget()
    assert not cuda_vetting.times_of(0, "few queries").measured


def test_kernels_found_wrong_are_refused_with_what_was_wrong(both):
    cuda_vetting.record_verdict(0, KIND, "AssertionError: out differs")
    assert dispatch.choose("auto", *FEW) == "triton"
    with pytest.raises(
        NotImplementedError, match="found the CUDA kernels wrong on this device for D64-fp16: Assertion"
    ):
        dispatch.choose("cuda", *FEW)
    other = HALF._replace(dtype=torch.float32)
    assert dispatch.choose("cuda", *other) == "cuda"


@pytest.mark.parametrize("wrong", [False, True])
def test_the_check_of_a_kind_is_run_once_and_recorded(both, monkeypatch, wrong):
    checked = []

    def check(problem, backend):
        checked.append((problem.query.dtype, backend))
        if wrong:
            raise AssertionError("out differs")

    monkeypatch.setattr(
        selfcheck, "make_problem", lambda case, kind, device: testing.make_problem(Case(dtype=kind.dtype))
    )
    monkeypatch.setattr(selfcheck.testing, "check", check)
    monkeypatch.setattr(selfcheck, "fault_of", lambda device: None)
    for _ in range(2):
        verdict = selfcheck.run_cuda(torch.device("cuda", 0), HALF)
        assert (verdict == "") != wrong
    assert not wrong or "AssertionError on B4-H2" in verdict
    assert len(checked) == (1 if wrong else 13)
    assert set(checked) == {(torch.float16, "cuda")}
    selfcheck.run_cuda(torch.device("cuda", 0), HALF, renew=True)
    assert len(checked) == (2 if wrong else 26)


def test_kernels_found_wrong_can_be_checked_again(both, monkeypatch):
    cuda_vetting.record_verdict(0, KIND, "AssertionError: out differs")
    monkeypatch.setattr(selfcheck, "make_problem", lambda case, kind, device: None)
    monkeypatch.setattr(selfcheck.testing, "check", lambda problem, backend: dispatch.choose(backend, *HALF))
    monkeypatch.setattr(selfcheck, "fault_of", lambda device: None)
    assert selfcheck.run_cuda(torch.device("cuda", 0), HALF) == "AssertionError: out differs"
    assert selfcheck.run_cuda(torch.device("cuda", 0), HALF, renew=True) == ""


def test_a_check_that_runs_out_of_memory_says_nothing(both, monkeypatch):
    def check(problem, backend):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(selfcheck, "make_problem", lambda case, kind, device: None)
    monkeypatch.setattr(selfcheck.testing, "check", check)
    assert selfcheck.run_cuda(torch.device("cuda", 0), HALF) is None
    assert cuda_vetting.verdict_of(0, KIND) is None


def test_a_kernel_that_ends_the_device_is_recorded_and_raises(both, monkeypatch):
    def check(problem, backend):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(selfcheck, "make_problem", lambda case, kind, device: None)
    monkeypatch.setattr(selfcheck.testing, "check", check)
    monkeypatch.setattr(selfcheck, "fault_of", lambda device: RuntimeError("unusable"))
    with pytest.raises(RuntimeError, match="expected the CUDA kernels for D64-fp16 to leave the device usable"):
        selfcheck.run_cuda(torch.device("cuda", 0), HALF)
    forget()
    assert "illegal memory access" in cuda_vetting.verdict_of(0, KIND)


def test_a_model_that_is_patched_has_its_kind_checked(both, monkeypatch):
    ran = []
    monkeypatch.setattr(selfcheck, "busy", lambda device: False)
    monkeypatch.setattr(selfcheck, "run", lambda *arguments: None)
    monkeypatch.setattr(selfcheck, "run_cuda", lambda device, facts: ran.append((device, facts)))
    monkeypatch.setattr(triton_vetting, "environment_of", lambda index: SimpleNamespace(card="Card"))
    monkeypatch.setattr(triton_vetting, "verdict_of", lambda index, configuration: None)
    for backend in ("auto", "cuda", "triton"):
        selfcheck.vet(torch.device("cuda", 0), backend, 64, torch.float16, torch.float16)
    assert ran == [(torch.device("cuda", 0), HALF)] * 2


def test_tuning_times_both_kernels_where_both_are_right(both, monkeypatch):
    kind = cuda.kind_of_facts(Facts("cuda", torch.bfloat16, 128, ()))
    monkeypatch.setattr(triton_vetting, "refusals", lambda index, kind: [])
    monkeypatch.setattr(tuning.testing, "make_problem", lambda case, device: made.append(case))
    made, ran = [], []

    def clock(device, calls):
        ran.extend(calls)
        return [3e-5, 2e-5]

    assert tuning.time_backends("cuda:0", clock=clock) == {}  # unchecked
    cuda_vetting.record_verdict(0, kind, None)
    times = tuning.time_backends("cuda:0", clock=clock)
    assert times == dict.fromkeys(cuda_vetting.WORKS, (3e-5, 2e-5, True))
    assert [(case.B, case.Tq, case.P) for case in made] == [(64, 1, 1024), (8, 1024, 200)]
    assert len(ran) == 4
    assert dispatch.choose("auto", "cuda", torch.bfloat16, 128, ()) == "cuda"


def test_a_timed_call_is_forward_and_backward_of_the_operator():
    problem = testing.make_problem(Case(B=2, H=2, Hkv=1, Tq=5, Tk=5, P=7, D=8))
    reference = dispatch.ops.load_backend("reference")
    tuning._run(reference, problem, with_backward=False)
    tuning._run(reference, problem, with_backward=True)


def test_doctor_says_which_kernels_auto_takes_and_why(both, monkeypatch):
    console = Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = itertools.chain(["", "out differs", None], itertools.repeat(""))
    monkeypatch.setattr(selfcheck, "run_cuda", lambda device, facts, renew: next(found))
    assert doctor_report._show_cuda_kernels(console, every=False, recheck=False, tune=False)
    text = console.export_text()
    assert "few queries on cuda:0: cuda is faster (predicted: CUDA" in text
    assert "many queries on cuda:0: triton is faster (predicted: CUDA" in text
    assert "out differs" in text
    assert "failed: refused" in text
    assert "unchecked" in text
