"""Compile the kernels of a call for an architecture and say what their machine code is like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from launches import Launch, launches_of, problem_of
from machine_code import Code, analyse
from registry import Call, Entry, entry_of

from prefix_fast.backends.triton_config import Tile


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds."""

    shared: int  # bytes that one program may have
    shared_total: int
    reserved: int  # bytes of shared memory that each program takes besides
    warps: int
    programs: int


LIMITS = {
    "sm_80": Limits(166912, 167936, 1024, 64, 32),
    "sm_86": Limits(101376, 102400, 1024, 48, 16),
    "sm_89": Limits(101376, 102400, 1024, 48, 24),
    "sm_90": Limits(232448, 233472, 1024, 64, 32),
    "sm_100": Limits(232448, 233472, 1024, 64, 32),
    "sm_120": Limits(101376, 102400, 1024, 48, 32),
    "gfx942": Limits(65536, 65536, 0, 32, 32),
}
REGISTERS = 65536  # of a multiprocessor, 32 bit; a SIMD of gfx942 has 512 for each lane
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    architecture: str
    call: str
    kernel: str
    tile: str
    code: Code
    shared: int
    occupancy: int  # programs that fit on a multiprocessor together
    loops: dict[str, float]  # instructions per matrix instruction of each loop, by name
    faults: tuple[str, ...]


def figures(call: Call, architecture: str, chosen: str | None = None, tile: Tile | None = None) -> list[Figures]:
    """The kernels of a call; `chosen` limits them to one entry, `tile` replaces the table's configuration."""
    found: dict[str, tuple[Entry, Launch]] = {}
    torch.set_float32_matmul_precision(call.precision)
    for launch in launches_of(problem_of(call.shape), architecture, tile):
        entry = entry_of(launch)
        if chosen in (None, entry.name):
            found.setdefault(entry.name, (entry, launch))
    return [_figures_of(call, architecture, entry, launch) for entry, launch in found.values()]


def _figures_of(call: Call, architecture: str, entry: Entry, launch: Launch) -> Figures:
    kernel = launch.compile()
    code = analyse(kernel)
    blocks = [launch.constant(name) for name in ("BLOCK_Q", "BLOCK_K")]
    options = launch.options
    tile = "×".join(str(b) for b in blocks if b is not None)
    tile += f" {options.num_warps}w" + (f" {options.num_stages}s" if tile else "")
    names = entry.loops if len(code.loops) == len(entry.loops) else [f"loop {n}" for n in range(len(code.loops))]
    loops = {name: loop.cost for name, loop in zip(names, code.loops, strict=True)}
    shared = kernel.metadata.shared
    occupancy = programs_together(architecture, options.num_warps, code.registers, shared, _columns(kernel))
    faults = faults_of(architecture, call, entry, code, shared, blocks)
    return Figures(architecture, str(call), entry.name, tile.strip(), code, shared, occupancy, loops, faults)


def _columns(kernel: object) -> int:
    return getattr(kernel.metadata, "tmem_size", 0) or 0


def programs_together(architecture: str, warps: int, registers: int, shared: int, columns: int) -> int:
    """How many programs a multiprocessor runs at a time."""
    limits = LIMITS[architecture]
    if architecture.startswith("gfx"):
        waves = min(8, 512 // (-(-registers // 8) * 8))
        by_registers = 4 * waves // warps
    else:
        by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = limits.shared_total // (-(-(shared + limits.reserved) // 128) * 128) if shared else limits.programs
    by_columns = TENSOR_COLUMNS // columns if columns else limits.programs
    return min(by_registers, by_shared, by_columns, limits.warps // warps, limits.programs)


def faults_of(
    architecture: str, call: Call, entry: Entry, code: Code, shared: int, blocks: list[int | None]
) -> tuple[str, ...]:
    """What is wrong with a compiled kernel, in a few words each."""
    faults = []
    dots = bool(entry.loops)
    if code.spills_in_loops:
        faults.append(f"{code.spills_in_loops} spills in loops")
    if code.stack > 128:
        faults.append(f"stack {code.stack}")
    if dots and max(b or 0 for b in blocks) >= 64 and code.registers < 64:
        faults.append(f"only {code.registers} registers")
    if shared > LIMITS[architecture].shared:
        faults.append(f"shared {shared} > {LIMITS[architecture].shared}")
    products = not (call.shape.dtype == torch.float32 and call.precision == "highest")
    if dots and products and not code.matrix:
        faults.append("no matrix instructions")
    if dots and products and len(code.loops) != len(entry.loops):
        faults.append(f"{len(code.loops)} loops, expected {len(entry.loops)}")
    return tuple(faults)
