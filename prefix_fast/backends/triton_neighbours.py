"""Tiles that tuning tries beside the table's: one step away from it, where the card has room for them."""

from __future__ import annotations

from prefix_fast.backends.triton_config import Device, Tile

SHARED_MEMORY = {  # bytes that one program may have
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx942": 65536,
}  # fmt: skip
ACCUMULATORS = 128  # float32 scores and sums that a thread has registers for, beside everything else


def neighbours(device: Device, kernel: str, tile: Tile, block_d: int, element: int, mixed: bool) -> tuple[Tile, ...]:
    """The tiles worth timing, without `tile` itself. What turns out to need more shared memory, its launch refuses.

    Args:
        device: the card, or the interpreter.
        kernel: that runs the tiles.
        tile: the table's.
        block_d: padded head dim.
        element: bytes of one number of the queries.
        mixed: segments are float32 beside half-precision queries; launches then have one stage.
    """
    queries, keys, warps, stages = tile
    steps = [
        Tile(queries // 2, keys, warps, stages), Tile(queries // 2, keys, warps // 2, stages),
        Tile(queries * 2, keys, warps, stages), Tile(queries, keys // 2, warps, stages),
        Tile(queries, keys // 2, warps // 2, stages), Tile(queries, keys * 2, warps, stages),
        Tile(queries, keys, 4 if warps == 8 else 8, stages),
    ]  # fmt: skip
    if not mixed:
        steps += [tile._replace(stages=stages - 1), tile._replace(stages=stages + 1)]
    amd = device.architecture.startswith("gfx")
    room = SHARED_MEMORY.get(device.architecture, min(SHARED_MEMORY.values()))
    most_held = max(ACCUMULATORS, _held(kernel, tile, block_d, amd))
    return tuple(
        step
        for step in steps
        if min(step.queries, step.keys) >= 16 and max(step.queries, step.keys) <= 128
        and min(4, warps) <= step.warps <= 8 and 1 <= step.stages <= (2 if amd else 4)
        and least_shared(kernel, step, block_d, element) <= room
        and _held(kernel, step, block_d, amd) <= most_held
    )  # fmt: skip


def least_shared(kernel: str, tile: Tile, block_d: int, element: int) -> int:
    """Bytes of shared memory that the tile takes at the least: an operand of a loop, for all its stages."""
    return tile.stages * (tile.queries if kernel == "dkv" else tile.keys) * block_d * element


def _held(kernel: str, tile: Tile, block_d: int, amd: bool) -> int:
    """Float32 scores, their gradients and sums that one thread holds."""
    queries, keys = tile.queries, tile.keys
    if kernel == "dkv":
        numbers = 2 * keys * (queries + block_d)
    else:
        numbers = queries * ((2 if kernel in ("dq", "short") else 1) * keys + block_d)
    return numbers // (tile.warps * (64 if amd else 32))
