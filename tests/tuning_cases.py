"""Tuning under Triton's interpreter; `test_tuning.py` runs this file in a process that begins with it.

Launches are real; the clock is fake, and a wrong tile is a right one whose launches leave a head out.
"""

import pytest
import torch
from selfcheck_cases import CALLS, KERNELS, KIND, Tampered

from prefix_fast import selfcheck, testing, tuning
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_vetting import Configuration
from prefix_fast.testing import Case

# A wrong tile leaves memory as it was, whatever was in it, and the next kernel adds it up.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
FEW = Case(B=1, H=1, Hkv=1, Tq=5, Tk=5, P=3, D=16)
WRONG, RIGHT = Tile(32, 16, 1, 1), Tile(32, 32, 1, 2)
SHAPES = dict.fromkeys(KERNELS, (Case(B=1, Tq=33, Tk=33, P=9),)) | {
    "forward": (Case(B=1, Tq=65, Tk=33, P=9),), "few": (Case(B=1, Tq=5, Tk=20, P=9),),
    "split": (Case(B=2, Tq=1, Tk=70, P=70),),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_and_apart(monkeypatch, tmp_path):
    """Verdicts in a folder of their own, two neighbours, one shape, one case of a check."""
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
    forget()
    choices = triton_vetting.choices
    monkeypatch.setattr(triton_vetting, "choices", lambda *known: (*choices(*known)[:2], WRONG, RIGHT))
    monkeypatch.setattr(tuning, "SHAPES", SHAPES)
    monkeypatch.setattr(tuning, "HEADS", {64: (2, 1)})
    for kernel, (run_kernel, cases) in list(selfcheck._CHECKED.items()):
        monkeypatch.setitem(selfcheck._CHECKED, kernel, (run_kernel, lambda *tile, cases=cases: cases(*tile)[1:2]))


def forget():
    for name in ("_verdicts", "_tiles", "_refusals", "_warned"):
        getattr(triton_vetting, name).clear()


class Recorded(Tampered):
    """Launches that are remembered by keys, warps and stages; those with WRONG leave a head out."""

    def __getitem__(self, grid):
        def launch(**arguments):
            tile = (arguments["BLOCK_K"], arguments["num_warps"], arguments["num_stages"])
            self.wrong_warps = (arguments["num_warps"],) if tile == WRONG[1:] else ()
            super(Recorded, self).__getitem__(grid)(**arguments)
            self.launched[-1] = tile

        return launch


def record(monkeypatch, kernel):
    module, name, output = KERNELS[kernel]
    recorded = Recorded(getattr(module, name), output, "unwritten", ())
    monkeypatch.setattr(module, name, recorded)
    return recorded


def tune(configuration):
    """Tune with a clock on which RIGHT is fast and WRONG faster; the verdict and what was timed."""
    timed = []

    def clock(device, calls):
        for call in calls:
            call()
        timed.extend(call.args[0] for call in calls)
        return [{WRONG: 0.1, RIGHT: 0.5}.get(call.args[0], 1.0) for call in calls]

    return tuning.tune("cpu", [configuration], clock=clock)[configuration], timed


@pytest.mark.parametrize("kernel", ["dq", *(pytest.param(k, id=f"slow-{k}") for k in KERNELS if k != "dq")])
def test_the_launched_tile_is_the_fastest_right_one(kernel, monkeypatch):
    configuration = Configuration(kernel, KIND)
    launches = record(monkeypatch, kernel)
    verdict, timed = tune(configuration)
    assert verdict.failure is None and verdict.tuned == RIGHT
    assert set(timed) == set(triton_vetting.choices(None, configuration))
    assert {tile[1:] for tile in timed if kernel != "short" or tile != verdict.safe_tile} <= set(launches.launched)
    forget()  # what follows is read from disk
    launches.launched.clear()
    testing.check(testing.make_problem(CALLS.get(kernel, FEW)), "triton")
    assert set(launches.launched) == {RIGHT[1:]}


def test_runs_after_tuning_repeat_bit_for_bit():
    verdict, _ = tune(Configuration("split", KIND))
    problem = testing.make_problem(CALLS["split"])
    results = []
    for deterministic in (False, True, False):
        forget()  # as a new process
        torch.use_deterministic_algorithms(deterministic)
        results.append(testing.evaluate(problem, "triton")["out"])
        assert triton_vetting.tiles_of_call(None, KIND).split == verdict.tuned != verdict.tile
    assert all(torch.equal(result, results[0]) for result in results)
