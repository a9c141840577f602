"""Which tiles the Triton kernels use: a table per architecture."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}  # of float32 products, by PyTorch's own setting


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
    split: Tile = Tile(64, 64, 4, 2)  # of the split forward: at most so many queries of the readers of a segment
    short: Tile = Tile(64, 64, 4, 1)  # of the fused backward of short segments
    few: Tile = Tile(16, 64, 4, 2)  # of the one-pass forward where rows have few queries


def padded(size: int) -> int:
    """The least block that holds `size`: a power of two, as products take them from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def every_kernel(tile: Tile) -> Tiles:
    """The same configuration for all kernels."""
    return Tiles(*(tile for _ in Tiles._fields))


class Device(NamedTuple):
    """What the cost model knows of a device."""

    architecture: str
    multiprocessors: int


def _of_256(forward: Tile, dq: Tile, dkv: Tile) -> Tiles:
    """Head dims beyond 128: the kernels of few queries take small tiles too."""
    return Tiles(forward, dq, dkv, split=Tile(16, 32, 4, 1), short=Tile(32, 32, 4, 1), few=Tile(32, 32, 4, 1))


# Half precision, by the largest head dim: of the tiles tried, the largest whose loops of a plain causal call keep
# everything in registers. Chosen by the machine code of ahead-of-time compilation; nothing has been timed.
_AMPERE = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 3)),
    256: _of_256(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
}
_ADA = {
    64: _AMPERE[64],
    128: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), split=Tile(64, 32, 4, 2)),
    256: _of_256(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
}
TABLE = {
    "sm_80": _AMPERE,
    "sm_86": _ADA,
    "sm_89": _ADA,
    "sm_90": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: _of_256(Tile(128, 32, 8, 1), Tile(128, 32, 8, 2), Tile(32, 32, 8, 3)),
    },
    "sm_100": {
        64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: _of_256(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 3)),
    },
    "sm_120": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        128: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), split=Tile(64, 32, 4, 2)),
        256: _of_256(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 3)),
    },
    "gfx942": {
        64: Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 8, 1), Tile(32, 128, 4, 1)),
        128: Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(16, 64, 4, 1)),
        256: _of_256(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 32, 4, 1)),
    },
}
# Float32 on NVIDIA, forward, dq and dkv by the precision of the products. Without tensor cores a thread holds whole
# rows of its operands; three products of tf32 hold each operand twice.
_FLOAT32 = {
    "ieee": {
        64: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        128: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
        256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "tf32x3": {
        64: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        128: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
    },
    "tf32": {
        64: (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        128: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
}
# Float32 segments beside half-precision queries, where a thread has no registers to convert the table's tiles in.
_MIXED = {
    64: {"forward": Tile(64, 64, 8, 1), "dq": Tile(64, 32, 8, 1), "dkv": Tile(32, 64, 4, 1)},
    128: {"forward": Tile(64, 64, 8, 1), "dq": Tile(64, 32, 8, 1)},
    256: {"dq": Tile(32, 16, 8, 1)},
}
_MIXED_AS_TABLE = ("sm_90", "sm_100")
_ROOMY = ("sm_90", "sm_100")  # with shared memory for every stage, whatever the options of a call
_INTERPRETER = every_kernel(Tile(32, 32, 1, 1))
_MULTIPROCESSORS_OF_INTERPRETER = 8


def precision_of(dtype: torch.dtype, head_dim: int) -> str:
    """Of the products, under the present `torch.get_float32_matmul_precision`.

    Half precision has one. Beyond a head dim of 128 tf32 keeps its operands in memory, however small the tiles are, and
    AMD has matrix cores for float32 and no tf32x3: there float32 products are exact.
    """
    exact = dtype != torch.float32 or head_dim > 128 or torch.version.hip is not None
    return "ieee" if exact else PRECISIONS[torch.get_float32_matmul_precision()]


def tiles_for(device: Device, head_dim: int, dtype: torch.dtype, precision: str = "ieee", mixed: bool = False) -> Tiles:
    """The configurations for a head dim; small safe ones where the table has no entry.

    Args:
        device: the card, or the interpreter.
        head_dim: of the call, padded or not.
        dtype: of the queries.
        precision: of float32 products, as from `precision_of`.
        mixed: segments are float32 beside half-precision queries.
    """
    if device.architecture == "interpreter":
        return _INTERPRETER
    size = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    safe, amd = safe_tiles(head_dim), device.architecture.startswith("gfx")
    if dtype != torch.float32:
        tiles = TABLE.get(device.architecture, _ADA)[size]
        if not mixed or device.architecture in _MIXED_AS_TABLE:
            return tiles
        return safe._replace(split=tiles.split, few=tiles.few) if amd else tiles._replace(**_MIXED.get(size, {}))
    if amd or size not in _FLOAT32[precision]:
        return safe
    forward, dq, dkv = _FLOAT32[precision][size]
    return safe._replace(forward=forward, dq=dq, dkv=dkv)


@functools.lru_cache(maxsize=1024)
def with_room(device: Device, tiles: Tiles, block_d: int, wide_bias: bool) -> Tiles:
    """The tiles for a call with a bias or dropout, which need shared memory too: fewer stages where a card has little.

    A float32 bias beside half-precision queries is loaded as many stages ahead as keys and values, and dq of a large
    head dim has no room for that beside all its queries.
    """
    if device.architecture in _ROOMY or not (wide_bias or block_d > 64):
        return tiles
    fewer = Tiles(*(tile._replace(stages=min(tile.stages, 2)) for tile in tiles))
    if device.architecture == "sm_80":
        return tiles._replace(forward=fewer.forward) if wide_bias and block_d > 64 else tiles
    if wide_bias and block_d > 64:
        return fewer._replace(dq=fewer.dq._replace(queries=min(fewer.dq.queries, 64)))
    return fewer


def safe_tiles(block_d: int) -> Tiles:
    """Small configurations outside every known miscompile: no block of 64, so no warp-group products; one stage.

    Their float32 tiles fit the least shared memory of the table's architectures.
    """
    block = 32 if block_d <= 128 else 16
    return every_kernel(Tile(block, block, 4, 1))._replace(split=Tile(16, block, 4, 1))


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
