"""Which tiles and how many splits the Triton kernels use: a model on static shapes, and a table per architecture."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One configuration of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The configurations of all kernels for one head dim and element size."""

    forward: Tile
    dq: Tile
    dkv: Tile


class Device(NamedTuple):
    """What the cost model knows of a device."""

    architecture: str
    multiprocessors: int


# Half precision, by the padded head dim. Starting points: sm_90 alone has been compiled, and nothing has been timed.
_AMPERE = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
}
_ADA = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 1)),
}
TABLE = {
    "sm_80": _AMPERE,
    "sm_86": _ADA,
    "sm_89": _ADA,
    "sm_90": {
        64: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(32, 128, 8, 2)),
    },
    "sm_100": {
        64: Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
        128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    "sm_120": {
        64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 1)),
    },
    "gfx942": {
        64: Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 8, 1), Tile(32, 128, 4, 1)),
        128: Tiles(Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
    },
}
_INTERPRETER = Tiles(Tile(32, 32, 1, 1), Tile(32, 32, 1, 1), Tile(32, 32, 1, 1))
_FULL_PRECISION = Tile(32, 32, 4, 1)
_MULTIPROCESSORS_OF_INTERPRETER = 8
_OCCUPANCY = 2  # programs that share a multiprocessor
_FILL = 0.85  # of the device, below which work is split further
_TILES_PER_SPLIT = 4


def tiles_for(device: Device, block_d: int, dtype: torch.dtype) -> Tiles:
    """The configurations for a padded head dim; small safe ones where the table has no entry."""
    if device.architecture == "interpreter":
        return _INTERPRETER
    small = Tiles(*[_FULL_PRECISION] * 3)
    if dtype == torch.float32:
        return small
    if block_d > 128:
        return Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1))
    return TABLE.get(device.architecture, _ADA)[max(block_d, 64)]


@functools.cache
def device_of(index: int | None) -> Device:
    """The architecture and size of a CUDA or ROCm device; None: the interpreter."""
    if index is None:
        return Device("interpreter", _MULTIPROCESSORS_OF_INTERPRETER)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        major, minor = properties.major, properties.minor
        if major == 8 and minor not in (0, 9):
            minor = 6
        architecture = f"sm_{major * 10 + (minor if major == 8 else 0)}"
    return Device(architecture, properties.multi_processor_count)


class Splits(NamedTuple):
    """Into how many programs the readers of a segment, and the queries of each, are divided."""

    readers: int
    queries: int


def splits_for(device: Device, programs: int, pairs: int, query_tiles: int) -> Splits:
    """The least number of splits that fills the device, with enough query tiles for each to be worth its partial sums.

    `programs` there are without splitting; each walks about `pairs` (rows × heads of a group) of `query_tiles`.
    """
    least = 1 if device.architecture == "interpreter" else _TILES_PER_SPLIT
    wanted = math.ceil(_FILL * device.multiprocessors * _OCCUPANCY / max(programs, 1))
    wanted = max(1, min(wanted, pairs * query_tiles // least))
    readers = min(wanted, max(pairs, 1))
    return Splits(readers, max(1, min(wanted // readers, query_tiles)))
