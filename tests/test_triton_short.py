"""The fused backward of short prefixes: its results under Triton's interpreter, and when the cost model chooses it."""

from pathlib import Path

import pytest
from interpreted import run_module
from test_triton_interpreter import pytestmark as needs_triton

from prefix_fast.backends.triton_config import Device, Tile
from prefix_fast.backends.triton_cost import LEAST_TILES, Shape, fuses_short_prefix, short_splits

H100 = Device("sm_90", 132)
TILE = Tile(64, 64, 4, 1)
GPT2 = Shape(rows=32, heads=12, kv_heads=12, queries=512, keys=512, head_dim=64, element=2, sets=((1, 10),))


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", *(pytest.param(half, marks=pytest.mark.slow) for half in ("fp16", "bf16"))])
def test_gradients_agree_with_the_oracle(dtype: str, root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_short", "oracle", dtype)


@needs_triton
def test_bits_depend_on_nothing_but_the_row_and_its_segment(root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_short", "bits")


@needs_triton
def test_calls_that_it_cannot_serve_take_the_other_kernels(root: Path) -> None:
    assert "0 failures" in run_module(root, "triton_short", "others")


@pytest.mark.parametrize(
    ("device", "shape", "fused"),
    [
        pytest.param(H100, GPT2, True, id="GPT-2"),
        pytest.param(H100, GPT2._replace(sets=((4, 10),)), True, id="GPT-2 with a bank of 4"),
        pytest.param(H100, GPT2._replace(sets=((1, 32),)), True, id="32 keys"),
        pytest.param(H100, GPT2._replace(sets=((1, 33),)), False, id="registers spill with 33 keys"),
        pytest.param(H100, GPT2._replace(sets=((1, 200),)), False, id="200 keys"),
        pytest.param(H100, GPT2._replace(sets=((1, 10), (1, 10))), False, id="two sets"),
        pytest.param(H100, GPT2._replace(sets=((1, 0),)), False, id="no keys"),
        pytest.param(H100, GPT2._replace(rows=1, queries=16, keys=16), False, id="one row of 16 tokens"),
        pytest.param(H100, GPT2._replace(rows=1), False, id="one row of 512 tokens"),
        pytest.param(H100, GPT2._replace(head_dim=256), False, id="wide heads"),
        pytest.param(Device("sm_80", 108), GPT2, False, id="registers spill on sm_80"),
        pytest.param(Device("sm_100", 148), GPT2._replace(sets=((1, 32),)), True, id="32 keys on sm_100"),
    ],
)
def test_it_is_chosen_where_it_saves_time(device: Device, shape: Shape, fused: bool) -> None:
    assert fuses_short_prefix(device, shape, TILE) is fused


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
def test_splits_fill_the_device_with_enough_tiles_each(kv_heads: int) -> None:
    shape = GPT2._replace(kv_heads=kv_heads)
    splits = short_splits(H100, shape, TILE)
    tiles = 32 * (12 // kv_heads) * 8
    assert tiles // splits >= LEAST_TILES
    places = 2 * H100.multiprocessors
    rounds = -(-kv_heads * splits // places)
    assert kv_heads * tiles / (rounds * -(-tiles // splits) * places) >= 0.85
