"""Verdicts on the tiles of the Triton kernels: which tile a launch uses, and what is kept on disk; cards are faked."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import timeit
import warnings

import pytest
import torch
from faked_cards import DKV, KIND, files, forget, table_tile

from prefix_fast import selfcheck
from prefix_fast.backends import triton_config, triton_vetting
from prefix_fast.backends.triton_config import TABLE, Tile, device_of, safe_tiles, tiles_for
from prefix_fast.backends.triton_vetting import Configuration

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("card")


def used_tile(kernel="dkv", kind=KIND):
    return getattr(triton_vetting.tiles_of_call(0, kind), kernel)


def test_an_unchecked_configuration_uses_the_safe_tile_without_a_warning():
    assert used_tile() == safe_tiles(64).dkv != table_tile()


def test_a_passed_configuration_uses_the_tile_of_the_table():
    assert used_tile() == safe_tiles(64).dkv
    triton_vetting.record(0, DKV, None, None)
    assert used_tile() == table_tile()
    assert used_tile("dq") == safe_tiles(64).dq
    assert used_tile(kind=KIND._replace(mixed=True)) == safe_tiles(64).dkv


def test_a_failed_configuration_uses_the_safe_tile_with_one_warning():
    triton_vetting.record(0, DKV, "AssertionError: grad.key is wrong", None)
    with pytest.warns(UserWarning, match=r"dkv-D64-bf16 wrong on Card 0.*grad\.key is wrong.*doctor") as caught:
        assert used_tile() == safe_tiles(64).dkv
    assert len(caught) == 1
    triton_vetting.record(0, Configuration("dq", KIND), None, None)  # another verdict makes the choice anew
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert used_tile() == safe_tiles(64).dkv
        assert used_tile("dq") == table_tile("dq")


def test_the_interpreter_needs_no_check():
    assert triton_vetting.tiles_of_call(None, KIND) == tiles_for(device_of(None), 64, torch.bfloat16)


def test_the_choice_costs_less_than_two_microseconds():
    triton_vetting.tiles_of_call(0, KIND)
    seconds = min(timeit.repeat(lambda: triton_vetting.tiles_of_call(0, KIND), number=2000, repeat=20)) / 2000
    assert seconds < 2e-6


@pytest.mark.parametrize("block_d", selfcheck.BLOCKS)
def test_safe_tiles_are_outside_the_known_miscompiles(block_d):
    for tile in safe_tiles(block_d):
        assert max(tile.queries, tile.keys) < 64 and min(tile.queries, tile.keys) >= 16 and tile.stages == 1


def test_every_kind_has_its_tiles_on_every_architecture():
    for architecture in (*TABLE, "gfx90a", "sm_999"):
        for kind in selfcheck.all_kinds():
            device = triton_config.Device(architecture, 8)
            assert all(isinstance(tile, Tile) for tile in tiles_for(device, *kind))


@pytest.mark.parametrize("found", [(None, None), ("wrong: ü\n", None), ("wrong", "wrong too")])
def test_a_verdict_outlives_its_process(found, tmp_path):
    verdict = triton_vetting.record(0, DKV, *found)
    (file,) = files(tmp_path)
    forget()
    assert triton_vetting.verdict_of(0, DKV) == verdict
    assert triton_vetting.verdict_of(0, Configuration("dq", KIND)) is None
    entry = json.loads(file.read_bytes())
    assert entry["environment"]["card"] == "Card 0" and entry["tile"] == list(table_tile())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"failure": null, "safe_failure": null}',
     "failure", "tile", "environment", "configuration", "truth"],
    ids=lambda content: str(content[:40]),
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_and_written_anew(content, tmp_path):
    verdict = triton_vetting.record(0, DKV, None, None)
    (file,) = files(tmp_path)
    entry = json.loads(file.read_bytes())
    changes = {
        "failure": {"failure": 3}, "tile": {"tile": [16, 16, 1, 1]}, "configuration": {"configuration": "dq-D64-bf16"},
        "environment": {"environment": {**entry["environment"], "driver": "another"}}, "truth": {"failure": False},
    }  # fmt: skip
    file.write_bytes(json.dumps({**entry, **changes[content]}).encode() if isinstance(content, str) else content)
    forget()
    assert triton_vetting.verdict_of(0, DKV) is None
    assert used_tile() == safe_tiles(64).dkv
    triton_vetting.record(0, DKV, None, None)
    forget()
    assert triton_vetting.verdict_of(0, DKV) == verdict


@pytest.mark.parametrize("change", ["name", "minor", "driver", "kernels", "triton", "torch", "tile"])
def test_a_verdict_holds_for_its_card_driver_versions_kernels_and_tile_alone(change, card, monkeypatch):
    triton_vetting.record(0, DKV, None, None)
    forget()
    if change in ("name", "minor"):
        setattr(card, change, {"name": "Other card", "minor": 3}[change])
    elif change == "driver":
        monkeypatch.setattr(triton_vetting, "driver_of", lambda: "another")
    elif change == "kernels":
        monkeypatch.setattr(triton_vetting, "_hash_of_kernels", lambda: "another")
    elif change == "tile":
        other = {**TABLE["sm_90"], 64: TABLE["sm_90"][64]._replace(dkv=Tile(16, 16, 1, 1))}
        monkeypatch.setitem(TABLE, "sm_90", other)
    else:
        monkeypatch.setattr(importlib.import_module(change), "__version__", "0.0")
    assert triton_vetting.verdict_of(0, DKV) is None


def test_the_hash_covers_every_kernel_source(root):
    digest = hashlib.sha256()
    for file in sorted((root / "kernels").glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    assert triton_vetting._hash_of_kernels() == digest.hexdigest()[:16]


def test_an_unwritable_cache_warns_once_and_verdicts_last_for_the_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="last for this process: set PREFIX_FAST_CACHE"):
        triton_vetting.record(0, DKV, None, None)
    triton_vetting.record(0, Configuration("dq", KIND), None, None)  # a second warning would be an error
    assert used_tile() == table_tile()
    forget()
    assert triton_vetting.verdict_of(0, DKV) is None


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert triton_vetting.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PREFIX_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for shared in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        assert triton_vetting.cache_folder() == tmp_path / ".cache" / "prefix_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert triton_vetting.cache_folder() == tmp_path / "xdg" / "prefix_fast"


def test_processes_that_write_at_once_leave_whole_files(tmp_path):
    program = """
import sys, torch
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_vetting import Configuration, Kind
for turn in range(20):
    for block_d in (16, 64):
        configuration = Configuration("dkv", Kind(block_d, torch.bfloat16, "ieee", False))
        triton_vetting.record(None, configuration, sys.argv[1] * (1 + turn), None)
        triton_vetting._verdicts.clear()
        assert triton_vetting.verdict_of(None, configuration) is not None
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", program]
    running = [subprocess.Popen([*command, name], env=environment, stderr=subprocess.PIPE) for name in "abc"]
    assert [(process.communicate()[1], process.returncode) for process in running] == [(b"", 0)] * 3
    assert [file.name for file in files(tmp_path)] == ["dkv-D16-bf16.json", "dkv-D64-bf16.json"]
    failure = triton_vetting.verdict_of(None, Configuration("dkv", KIND)).failure
    assert failure in ("a" * 20, "b" * 20, "c" * 20)
