"""Which path a forward pass takes, and into how many parts; and the split forward, in a process of its own."""

import importlib.util
from pathlib import Path

import pytest
import torch
from interpreted import run_cases

from prefix_fast.backends import triton_forward
from prefix_fast.backends.triton_call import make_call
from prefix_fast.backends.triton_config import Device, tiles_for
from prefix_fast.backends.triton_cost import CARDS, OCCUPANCY, Shape, Split, blocks, key_chunks
from prefix_fast.testing import Case, make_problem

H100 = Device("sm_90", 132)


def choice(device: Device = H100, H: int = 32, Hkv: int = 8, D: int = 128, **sizes: int) -> Split | None:
    tiles = tiles_for(device, D, torch.bfloat16)
    N = sizes.get("N", 1)
    sets = ((N, sizes["P"]),) if "P" in sizes else ()
    shape = Shape(sizes["B"], H, Hkv, sizes.get("Tq", 1), sizes["Tk"], D, 2, sets)
    return key_chunks(device, shape, tiles.split, tiles.few)


@pytest.mark.parametrize("name", CARDS)
def test_decoding_a_long_shared_prefix_is_split(name):
    """One pass reads the prefix for every row; split, once for 64 queries, by about as many programs as have room."""
    device = Device(CARDS[name].architecture, CARDS[name].multiprocessors)
    for H, Hkv, D in ((32, 8, 128), (12, 12, 64)):
        split = choice(device, H, Hkv, D, B=64, P=8192, Tk=64)
        assert split is not None and split.chunks[1] == 1
        programs = split.chunks[0] * -(-64 * H // Hkv // split.queries) * Hkv
        assert programs >= device.multiprocessors * OCCUPANCY / 2


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"B": 4, "P": 16, "Tk": 64}, "a second launch costs more than all of a short chain"),
        ({"B": 4, "P": 128, "Tk": 128}, "no part has keys for two chunks"),
        ({"B": 64, "P": 8192, "Tk": 128, "Tq": 128}, "a row's own queries fill a tile"),
        ({"B": 256, "Tk": 300}, "nothing is shared, and the rows alone fill the device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_pass_where_a_split_costs_more_than_it_saves(sizes, reason):
    assert choice(**sizes, H=8) is None, reason


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"B": 1, "P": 8192, "Tk": 64}, "one row has 8 heads' work for 264 places"),
        ({"B": 1, "Tk": 8192}, "so has a long row of its own tokens"),
        ({"B": 32, "P": 4096, "Tk": 128, "Tq": 4}, "verifying 4 drafted tokens reads the prefix as decoding does"),
        ({"B": 64, "P": 4096, "Tk": 64, "N": 8}, "eight rows share each prefix of a bank"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_split_where_programs_are_few_or_segments_shared(sizes, reason):
    assert choice(**sizes) is not None, reason


def test_blocks_hold_the_readers_queries_and_no_more():
    tile = tiles_for(H100, 128, torch.bfloat16).split
    assert tile.queries == 64
    for B, Tq, N, expected in ((1, 1, 1, (16, 16)), (8, 1, 1, (32, 16)), (64, 1, 1, (64, 16)), (64, 1, 64, (16, 16)),
                               (2, 8, 1, (64, 32)), (2, 16, 1, (64, 64))):  # fmt: skip
        assert blocks(Shape(B, 32, 8, Tq, 64, 128, 2, ((N, 512),)), tile) == expected


def test_a_growing_cache_changes_its_division_once_in_128_steps():
    calls = [make_call(make_problem(Case(B=1, H=2, Hkv=2, Tq=1, Tk=Tk)), H100, False) for Tk in (129, 200, 256, 257)]
    keys = [triton_forward.shape_of(call).keys for call in calls]
    assert keys == [256, 256, 256, 384]


def test_few_queries_take_a_small_tile_in_one_pass():
    tiles = tiles_for(H100, 128, torch.bfloat16)
    for Tq, expected in ((1, "few"), (32, "few"), (33, "forward"), (512, "forward")):
        call = make_call(make_problem(Case(B=1, H=2, Hkv=2, Tq=Tq, Tk=Tq)), H100, False)
        assert triton_forward._kernel_of_one_pass(call, tiles) == expected


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "chosen", ["chunks3 or places", pytest.param("not (chunks3 or places)", marks=pytest.mark.slow)]
)
def test_the_split_forward_is_right_in_the_interpreter(chosen: str, root: Path) -> None:
    run_cases(root, "triton_split.py", chosen)
