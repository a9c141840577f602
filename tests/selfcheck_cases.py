"""The self-check under Triton's interpreter; `test_triton_vetting.py` runs this file in a process that begins with it.

A wrong kernel is a right one whose launches with the table's tile, of one warp, are tampered with.
"""

import warnings

import pytest
import torch
from prefix_fast.kernels import (
    prefix_attention_bwd_dkv,
    prefix_attention_bwd_dq,
    prefix_attention_bwd_short,
    prefix_attention_fwd,
    prefix_attention_split_fwd,
)
from triton.runtime.errors import OutOfResources

from prefix_fast import prefix_attention, selfcheck, testing, tuning
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_vetting import Configuration, Kind
from prefix_fast.testing import Case

KIND = Kind(16, torch.float32, "ieee", False)
KERNELS = {
    "forward": (prefix_attention_fwd, "forward_kernel", "lse"),
    "few": (prefix_attention_fwd, "forward_kernel", "lse"),
    "split": (prefix_attention_split_fwd, "split_forward_kernel", "partial_lse"),
    "dq": (prefix_attention_bwd_dq, "dq_kernel", "grad_query"),
    "dkv": (prefix_attention_bwd_dkv, "dkv_kernel", "grad_key"),
    "short": (prefix_attention_bwd_short, "short_kernel", "grad_query"),
}
TABLE_WARPS, SAFE_WARPS = 1, 4
CALLS = {  # that run a kernel
    "forward": Case(B=1, H=1, Hkv=1, Tq=70, Tk=5, P=3, D=16),
    "split": Case(B=4, H=2, Hkv=2, Tq=1, Tk=70, P=70, D=16),
    "dq": Case(B=1, H=2, Hkv=2, Tq=5, Tk=5, P=70, D=16),
    "dkv": Case(B=1, H=2, Hkv=2, Tq=5, Tk=5, P=70, D=16),
    "short": Case(B=1, H=2, Hkv=2, Tq=5, Tk=5, P=3, D=16),
}


@pytest.fixture(autouse=True)
def _own_verdicts(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
    for name in ("_verdicts", "_tiles", "_refusals", "_warned"):
        getattr(triton_vetting, name).clear()


class Tampered:
    """Launches of a kernel, those with some numbers of warps wrong."""

    def __init__(self, kernel, output, fault, warps):
        self.kernel, self.output, self.fault, self.wrong_warps, self.launched = kernel, output, fault, warps, []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launched.append(arguments["num_warps"])
            wrong = arguments["num_warps"] in self.wrong_warps
            if wrong and self.fault == "too large":
                raise OutOfResources(131072, 101376, "shared memory")
            if wrong and self.fault == "raises":
                raise RuntimeError("out of resource: shared memory")
            heads_left_out = 1 if wrong and self.fault == "unwritten" else 0
            self.kernel[(grid[0], grid[1] - heads_left_out)](**arguments)
            if wrong and self.fault == "inexact" and arguments[self.output] is not None:
                arguments[self.output].mul_(1 + 1e-4)

        return launch


def tamper(monkeypatch, kernel, fault, warps=(TABLE_WARPS,)):
    module, name, output = KERNELS[kernel]
    tampered = Tampered(getattr(module, name), output, fault, warps)
    monkeypatch.setattr(module, name, tampered)
    return tampered


@pytest.fixture
def one_case_only(monkeypatch):
    for kernel, (run_kernel, cases) in list(selfcheck._CHECKED.items()):
        monkeypatch.setitem(selfcheck._CHECKED, kernel, (run_kernel, lambda *tile, cases=cases: cases(*tile)[1:2]))


@pytest.mark.parametrize("kernel", [pytest.param("few", id="slow-few"), *(name for name in KERNELS if name != "few")])
@pytest.mark.parametrize(
    "kind",
    [
        Kind(32, torch.bfloat16, "ieee", True),
        pytest.param(Kind(64, torch.float16, "ieee", False), id="slow-D64-fp16"),
        pytest.param(Kind(256, torch.float32, "tf32x3", False), id="slow-D256-fp32"),
    ],
    ids=str,
)
def test_right_kernels_pass(kernel, kind):
    configuration = Configuration(kernel, kind)
    verdicts = selfcheck.run("cpu", [configuration])
    assert verdicts[configuration].failure is None
    assert getattr(triton_vetting.tiles_of_call(None, kind), kernel).warps == TABLE_WARPS


@pytest.mark.usefixtures("one_case_only")
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [("forward", "raises"), ("split", "inexact"), ("dq", "inexact"), ("dq", "unwritten"), ("dkv", "inexact")],
)
def test_a_wrong_kernel_is_recorded_and_its_safe_tile_takes_over_with_one_warning(monkeypatch, kernel, fault):
    tampered = tamper(monkeypatch, kernel, fault)
    configuration = Configuration(kernel, KIND)
    verdict = selfcheck.run("cpu", [configuration])[configuration]
    assert verdict.failure is not None and verdict.safe_failure is None and not verdict.refused
    words = {"raises": "out of resource", "inexact": "differs from the float64 truth", "unwritten": "inf"}
    assert words[fault] in verdict.failure

    triton_vetting._verdicts.clear()  # what follows is read from disk
    tampered.launched.clear()
    problem = testing.make_problem(CALLS[kernel])
    with pytest.warns(UserWarning, match=f"the triton configuration {configuration} wrong on interpreter"):
        testing.check(problem, "triton")
    testing.check(problem, "triton")  # a second warning would be an error
    assert set(tampered.launched) == {SAFE_WARPS}


@pytest.mark.usefixtures("one_case_only")
def test_a_kernel_that_is_wrong_with_its_safe_tile_too_is_refused(monkeypatch):
    tamper(monkeypatch, "forward", "unwritten", (TABLE_WARPS, SAFE_WARPS))
    configuration = Configuration("forward", KIND)
    assert selfcheck.run("cpu", [configuration])[configuration].refused
    query, prefix = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="forward kernel wrong on this device for D16-fp32-ieee"):
        prefix_attention(query, query, query, prefix, prefix, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefix_attention(query, query, query, prefix, prefix)


@pytest.mark.parametrize("kernel", CALLS)
def test_a_tile_without_room_gives_way_to_its_safe_one_with_one_warning(monkeypatch, kernel):
    tampered = tamper(monkeypatch, kernel, "too large")
    problem = testing.make_problem(CALLS[kernel])
    expected = f"room for the triton configuration {kernel}-D16-fp32-ieee.*Required: 131072.*safe tile"
    with pytest.warns(UserWarning, match=expected) as caught:
        testing.check(problem, "triton")
    assert len(caught) == 1
    testing.check(problem, "triton")  # a second warning would be an error
    assert set(tampered.launched) == {TABLE_WARPS, SAFE_WARPS}


def test_a_self_check_and_tuning_are_told_of_a_tile_without_room(monkeypatch):
    tamper(monkeypatch, "dq", "too large")
    configuration = Configuration("dq", KIND)
    assert "Required: 131072" in selfcheck.failure(torch.device("cpu"), configuration, Tile(32, 32, TABLE_WARPS, 1))
    launch = tuning._launcher(torch.device("cpu"), None, configuration, Case(B=1, Tq=33, Tk=33, P=9))
    with pytest.raises(OutOfResources):
        launch(Tile(32, 32, TABLE_WARPS, 1))


@pytest.mark.usefixtures("one_case_only")
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_is_judged_alone(monkeypatch, kernel):
    """A wrong kernel fails none of the others: they get their inputs from the truth."""
    for other in KERNELS:
        if KERNELS[other] != KERNELS[kernel]:
            tamper(monkeypatch, other, "raises", (TABLE_WARPS, SAFE_WARPS))
    tried = tamper(monkeypatch, kernel, "none")
    configuration = Configuration(kernel, KIND)
    assert selfcheck.run("cpu", [configuration])[configuration].failure is None
    assert set(tried.launched) == {TABLE_WARPS}
