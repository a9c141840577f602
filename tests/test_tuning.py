"""Tuning: the fastest right tile is kept on disk, and calls use it; a wrong one never. Cards and clocks are faked.

Tuning with real launches runs in a process of its own, under Triton's interpreter: `tuning_cases.py`.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from faked_cards import DKV, KIND, files, forget, table_tile
from interpreted import run_cases

from prefix_fast import selfcheck, tuning
from prefix_fast.backends import triton_neighbours, triton_vetting
from prefix_fast.backends.triton_config import TABLE, Device, Tile, padded, safe_tiles, tiles_for
from prefix_fast.backends.triton_vetting import KERNELS, Configuration, Kind

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("card")
NEXT = Configuration("split", KIND)


class Bench:
    """What tuning meets: tiles that are wrong or do not launch, at all or with a bias; seconds of tiles, else 1."""

    def __init__(self):
        self.wrong, self.unlaunchable, self.roomless = set(), set(), set()
        self.seconds, self.checked, self.timed = {}, [], []

    def check(self, device, configuration, tile):
        self.checked.append(tile)
        return "AssertionError: grad.key: 3e-01" if tile in self.wrong else None

    def launcher(self, device, index, configuration, shape):
        def launch(tile):
            if tile in self.unlaunchable or (shape.attn_bias and tile in self.roomless):
                raise RuntimeError("out of resource: shared memory")

        return launch

    def clock(self, device, calls):
        self.timed += [call.args[0] for call in calls]
        return [self.seconds.get(call.args[0], 1.0) for call in calls]

    def tune(self, *wanted):
        return tuning.tune("cuda:0", wanted or [DKV], clock=self.clock)


@pytest.fixture
def bench(monkeypatch):
    found = Bench()
    monkeypatch.setattr(selfcheck, "_failure", found.check)
    monkeypatch.setattr(tuning, "_launcher", found.launcher)
    monkeypatch.setattr(selfcheck, "defaults", lambda device, kind: contextlib.nullcontext())
    return found


def others(configuration=DKV):
    table, safe, *near = triton_vetting.choices(0, configuration)
    assert len(near) >= 3 and table not in near and safe not in near
    return near


def used_tile(kernel="dkv"):
    return getattr(triton_vetting.tiles_of_call(0, KIND), kernel)


def test_the_fastest_right_tile_is_kept_and_used_by_calls(bench):
    slow, fast, fastest = others()[:3]
    bench.seconds = {slow: 0.9, fast: 0.8, fastest: 0.5}
    bench.wrong = {fastest}
    assert bench.tune()[DKV].tuned == fast
    assert bench.checked == [table_tile(), fastest, fast]  # what would not be chosen is not checked
    assert set(bench.timed) == set(triton_vetting.choices(0, DKV))
    assert used_tile() == fast
    forget()
    assert used_tile() == fast and used_tile("split") == safe_tiles(64).split


def test_a_tile_must_save_time_on_all_shapes_together(bench, monkeypatch):
    better_once = others()[0]
    seconds = iter([0.5, 2.2])
    monkeypatch.setattr(bench, "clock", lambda device, calls: _times(calls, {better_once: next(seconds)}))
    assert bench.tune()[DKV].tuned == table_tile()


def _times(calls, seconds):
    return [seconds.get(call.args[0], 1.0) for call in calls]


@pytest.mark.parametrize("seconds", [1.0, 0.98, 1.5])
def test_a_tie_and_noise_keep_the_tile_of_the_table(bench, seconds):
    bench.seconds = dict.fromkeys(others(), seconds)
    assert bench.tune()[DKV].tuned == table_tile() == used_tile()
    assert bench.checked == [table_tile()]


def test_a_tile_that_does_not_launch_is_left_out(bench):
    tile, fast = others()[:2]
    bench.unlaunchable, bench.seconds = {tile}, {tile: 0.1, fast: 0.5}
    assert bench.tune()[DKV].tuned == fast and tile not in bench.timed


def test_a_tile_must_have_room_for_every_option_that_the_present_one_has_room_for(bench):
    tile, fast = others()[:2]
    bench.roomless, bench.seconds = {tile}, {tile: 0.1, fast: 0.5}
    assert bench.tune()[DKV].tuned == fast
    selfcheck.run("cuda:0", [DKV], renew=True)
    bench.roomless.add(table_tile())
    assert bench.tune()[DKV].tuned == tile


def test_what_was_tuned_is_not_timed_again_until_a_recheck_forgets_it(bench):
    fast = others()[0]
    bench.seconds = {fast: 0.5}
    bench.tune()
    bench.timed.clear()
    bench.tune()
    assert bench.timed == []
    selfcheck.run("cuda:0", [DKV], renew=True)
    assert used_tile() == table_tile()
    bench.tune()
    assert bench.timed and used_tile() == fast


def test_a_failed_table_tile_is_replaced_by_a_right_neighbour_without_a_warning(bench):
    fast = others()[0]
    bench.wrong, bench.seconds = {table_tile()}, {table_tile(): 0.1, fast: 0.5}
    selfcheck.run("cuda:0", [DKV])
    with pytest.warns(UserWarning, match="slower safe tile is used"):
        assert used_tile() == safe_tiles(64).dkv
    assert bench.tune()[DKV].tuned == fast and table_tile() not in bench.timed
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert used_tile() == fast


def test_a_refused_kernel_is_not_tuned(bench):
    bench.wrong = {table_tile(), safe_tiles(64).dkv}
    assert bench.tune()[DKV].refused and bench.timed == []


def test_nothing_is_timed_where_the_kernel_does_not_run(bench, monkeypatch):
    monkeypatch.setattr(tuning, "_launcher", lambda *_: None)
    assert bench.tune()[DKV].tuned == table_tile() and bench.timed == []


def test_an_environment_variable_leaves_tuned_tiles_out(bench, monkeypatch):
    fast = others()[0]
    bench.seconds = {fast: 0.5}
    bench.tune()
    for value, tile in (("0", table_tile()), ("1", fast)):
        monkeypatch.setenv("PREFIX_FAST_TUNED", value)
        forget()
        assert used_tile() == tile


@pytest.mark.parametrize("change", ["name", "driver", "kernels", "triton", "torch"])
def test_a_choice_holds_for_its_card_driver_versions_and_kernels_alone(change, bench, card, monkeypatch):
    bench.seconds = {others()[0]: 0.5}
    bench.tune()
    forget()
    if change == "name":
        card.name = "Other card"
    elif change in ("driver", "kernels"):
        monkeypatch.setattr(
            triton_vetting, {"driver": "driver_of", "kernels": "_hash_of_kernels"}[change], lambda: "new"
        )
    else:
        monkeypatch.setattr(importlib.import_module(change), "__version__", "0.0")
    assert triton_vetting.verdict_of(0, DKV) is None and used_tile() == safe_tiles(64).dkv


@pytest.mark.parametrize("tuned", [[16, 48, 4, 1], [1, 2], [], "x", 7, {"a": 1}, [[1], 2, 3, 4]], ids=str)
def test_a_choice_that_tuning_could_not_make_is_ignored(tuned, bench, tmp_path):
    bench.tune()
    (file,) = files(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "tuned": tuned}))
    forget()
    assert triton_vetting.verdict_of(0, DKV) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_an_interruption_leaves_the_verdict_as_it_was(error, bench, monkeypatch):
    def interrupted(device, calls):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bench, "clock", interrupted)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                bench.tune()
        else:
            bench.tune()
    forget()
    assert triton_vetting.verdict_of(0, DKV).tuned is None and used_tile() == table_tile()
    bench.seconds = {others()[0]: 0.5}
    assert bench.tune()[DKV].tuned == others()[0]


@pytest.mark.parametrize("place", ["_runs", "failure"])
def test_a_tile_that_breaks_the_device_is_skipped_by_the_next_process(place, bench, monkeypatch):
    bad = others()[0]
    bench.seconds, broken = {bad: 0.5, others(NEXT)[0]: 0.5}, []

    def touch(tile):
        if tile == bad and not broken:
            broken.append(tile)

    def synchronize(device):
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    def check(device, configuration, tile):
        if place == "failure":
            touch(tile)
        return "RuntimeError: illegal memory access" if broken else None

    with monkeypatch.context() as patch:
        if place == "_runs":
            patch.setattr(tuning, "_launcher", lambda *_: touch)
        patch.setattr(selfcheck, "_failure", check)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(RuntimeError, match=r"dkv-D64-bf16 with the tile \(.*\) to leave the device usable"):
            bench.tune(DKV, NEXT)
    forget()
    found = bench.tune(DKV, NEXT)
    assert found[DKV].tuned == table_tile() and found[NEXT].tuned == others(NEXT)[0]


def test_a_process_that_dies_leaves_a_whole_file_and_the_next_goes_on(bench, root, tmp_path):
    program = f"""
import contextlib, os, sys
sys.path.insert(0, {str(root / "tests")!r})
import pytest
from faked_cards import DKV, fake_cards
from prefix_fast import selfcheck, tuning
fake_cards(pytest.MonkeyPatch(), (9, 0))
selfcheck._failure = lambda *_: None
selfcheck.defaults = lambda *_: contextlib.nullcontext()
tuning._launcher = lambda *_: lambda tile: None
tuning.tune("cuda:0", [DKV], clock=lambda *_: os._exit(9))
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], env=os.environ.copy(), capture_output=True)
    assert done.returncode == 9, done.stderr
    assert [file.name for file in files(tmp_path)] == ["dkv-D64-bf16.json"]
    assert triton_vetting.verdict_of(0, DKV).failure is None and used_tile() == table_tile()
    bench.tune(DKV, NEXT)
    assert set(bench.timed) == set(triton_vetting.choices(0, NEXT))


def test_the_callers_current_device_is_tuned(bench, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "_launcher", lambda device, *_: devices.append(device))
    tuning.tune("cuda", [DKV], clock=bench.clock)
    assert set(devices) == {torch.device("cuda", 0)}


def test_nothing_is_tuned_in_a_traced_or_captured_call(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="traced or captured"):
        bench.tune()
    assert bench.timed == []


def every_choice():
    """(architecture, configuration, tiles) of all that tuning chooses from."""
    for architecture in TABLE:
        device = Device(architecture, 8)
        for kind in selfcheck.all_kinds():
            for kernel in KERNELS:
                tile = getattr(tiles_for(device, *kind), kernel)
                near = triton_neighbours.neighbours(device, kernel, tile, kind.block_d, kind.dtype.itemsize, kind.mixed)
                yield architecture, kernel, kind, tile, near


def test_neighbours_are_few_possible_blocks_within_shared_memory():
    for architecture, kernel, kind, tile, near in every_choice():
        assert 1 <= len(near) <= 9 and len({tile, *near}) == 1 + len(near)
        for step in near:
            assert {step.queries, step.keys} <= {16, 32, 64, 128} and step.warps in (4, 8) and 1 <= step.stages <= 4
            least = triton_neighbours.least_shared(kernel, step, kind.block_d, kind.dtype.itemsize)
            assert least <= triton_neighbours.SHARED_MEMORY[architecture]
            assert not kind.mixed or step.stages == tile.stages


def test_the_least_shared_memory_is_below_what_compiled_kernels_take():
    from table import load

    kernels = {"forward": "forward", "split": "split", "dq": "dq", "dkv own": "dkv", "dkv prefix": "dkv"}
    rows = [row for row in load()[1].values() if row.kernel in kernels]
    assert len(rows) > 300
    for row in rows:
        size, dtype = row.call.split()[:2]
        element = 4 if dtype.startswith("fp32") else 2
        least = triton_neighbours.least_shared(kernels[row.kernel], Tile(*row.tile), padded(int(size[1:])), element)
        assert least <= row.shared, row


PROBLEMS = {}


@pytest.mark.parametrize("architecture", TABLE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_shapes_run_the_kernel_with_the_tile(architecture, kernel, monkeypatch):
    from launches import MULTIPROCESSORS, recording

    device = Device(architecture, MULTIPROCESSORS[architecture])
    monkeypatch.setattr(tuning, "device_of", lambda index: device)
    make_problem = tuning._problem

    def problem_of(shape, kind, device):
        key = (str(shape), kind)
        if key not in PROBLEMS:
            PROBLEMS[key] = make_problem(shape, kind, device)
        return PROBLEMS[key]

    monkeypatch.setattr(tuning, "_problem", problem_of)
    for kind in (KIND, Kind(128, torch.bfloat16, "ieee", False)):
        table = getattr(tiles_for(device, *kind), kernel)
        near = triton_neighbours.neighbours(device, kernel, table, kind.block_d, 2, False)
        for shape in tuning.SHAPES[kernel]:
            with recording(architecture) as launches:
                launch = tuning._launcher(torch.device("meta"), None, Configuration(kernel, kind), shape)
                if launch is None:
                    assert kernel == "short" and (
                        kind.block_d == 128 or architecture not in ("sm_90", "sm_100", "gfx942")
                    )
                    continue
                for tile in (table, near[0], near[-1]):
                    launches.clear()
                    launch(tile)
                    names = {"few": "forward_kernel", "split": "split_forward_kernel"}
                    ran = [x.tile for x in launches if x.kernel == names.get(kernel, f"{kernel}_kernel")]
                    assert ran and all(found[1:] == tile[1:] for found in ran)
                    assert all(found.queries == tile.queries or kernel == "split" for found in ran)


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_tuning_with_real_launches(root, chosen):
    run_cases(root, "tuning_cases.py", chosen)
