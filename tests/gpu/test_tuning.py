"""Tuning on this device: whatever tile it chooses, calls use it, and their results are right."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from prefix_fast import selfcheck, testing, tuning
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_vetting import Configuration, Kind
from prefix_fast.testing import Case

KIND = Kind(64, torch.float16, "ieee", False)
CALLS = {
    "forward": Case(B=2, H=4, Hkv=2, Tq=150, Tk=150, P=70, D=64, dtype=torch.float16),
    "dkv": Case(B=2, H=4, Hkv=2, Tq=70, Tk=70, P=70, D=64, dtype=torch.float16, dropout_p=0.1),
}
SMALL = {"forward": (Case(B=1, Tq=65, Tk=33, P=9),), "dkv": (Case(B=1, Tq=33, Tk=33, P=9),)}


def host_seconds(device: torch.device, calls: Sequence[Callable[[], None]]) -> list[float]:
    """The clock of the interpreter, which has no device to time."""
    times = []
    for call in calls:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


@pytest.fixture
def verdicts_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of this test's own, on disk and in memory."""
    with monkeypatch.context() as patch:
        patch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
        for name in ("_verdicts", "_tiles", "_refusals"):
            patch.setattr(triton_vetting, name, {})
        yield


@pytest.mark.usefixtures("verdicts_apart")
@pytest.mark.parametrize("kernel", CALLS)
def test_calls_use_the_tuned_tile_and_are_right(kernel: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = tuning.seconds_of
    if device == "cpu":
        choices, clock = triton_vetting.choices, host_seconds
        monkeypatch.setattr(triton_vetting, "choices", lambda *known: choices(*known)[:3])
        monkeypatch.setattr(tuning, "SHAPES", SMALL)
        monkeypatch.setattr(tuning, "HEADS", {64: (2, 1)})
    configuration = Configuration(kernel, KIND)
    verdict = tuning.tune(device, [configuration], clock=clock)[configuration]
    index = selfcheck.index_of(torch.device(device))
    assert verdict.tuned in triton_vetting.choices(index, configuration)
    for name in ("_verdicts", "_tiles"):  # what follows is read from disk
        getattr(triton_vetting, name).clear()
    assert getattr(triton_vetting.tiles_of_call(index, KIND), kernel) == verdict.tuned
    testing.check(testing.make_problem(CALLS[kernel], device), "triton")
