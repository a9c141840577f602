"""Compile the kernels of a call for an architecture: what their machine code is like, and what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from launches import Launch, launches_of, plain_launch, problem_of
from machine_code import Code, Loop, analyse
from registry import COUNTERPARTS, PLAIN_LOOPS, UNMASKED, Call, Entry, call_named, entry_named, entry_of

from prefix_fast.backends.triton_config import Device, Tile, Tiles, every_kernel, safe_tiles
from prefix_fast.backends.triton_neighbours import SHARED_MEMORY
from prefix_fast.backends.triton_vetting import Kind


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds."""

    shared: int  # bytes that one program may have
    shared_total: int
    reserved: int  # bytes of shared memory that each program takes besides
    warps: int
    programs: int
    least_warps: int  # that are to be resident: fewer leave tensor cores idle while they wait


LIMITS = {
    "sm_80": Limits(SHARED_MEMORY["sm_80"], 167936, 1024, 64, 32, 8),
    "sm_86": Limits(SHARED_MEMORY["sm_86"], 102400, 1024, 48, 16, 8),
    "sm_89": Limits(SHARED_MEMORY["sm_89"], 102400, 1024, 48, 24, 8),
    "sm_90": Limits(SHARED_MEMORY["sm_90"], 233472, 1024, 64, 32, 8),
    "sm_100": Limits(SHARED_MEMORY["sm_100"], 233472, 1024, 64, 32, 8),
    "sm_120": Limits(SHARED_MEMORY["sm_120"], 102400, 1024, 48, 32, 8),
    "gfx942": Limits(SHARED_MEMORY["gfx942"], 65536, 0, 32, 32, 4),
}
REGISTERS, REGISTERS_OF_LANE = 65536, 512  # 32 bit, of an NVIDIA multiprocessor; of a lane of an AMD SIMD
TENSOR_COLUMNS = 512  # of the tensor memory of a multiprocessor of sm_100
LARGEST_STACK = 128  # bytes
LEAST_REGISTERS = 64  # fewer, with 64 rows or more, are the mark of a compiler that gave up and spills everything
LARGEST_RATIO = 1.08  # instructions per matrix instruction against plain flash attention, in unmasked loops
LARGEST_RATIO_OF_DQ_ON_SM_90 = 1.14
SAME_COST = 1.05  # a loop that costs more than this times its masked sibling has been taken for it


@dataclass(frozen=True)
class Row:
    """One line of the table. `loops`: (instructions, matrix instructions, ratio to the plain kernel's or None)."""

    architecture: str
    call: str
    kernel: str
    tile: tuple[int, int, int, int]
    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    shared: int
    occupancy: int  # programs that a multiprocessor runs at a time
    matrix: int
    loops: dict[str, tuple[int, int, float | None]] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class Work:
    """One kernel of a call, before it is compiled."""

    architecture: str
    call: Call
    entry: Entry
    launch: Launch
    plain: Launch | None

    @property
    def name(self) -> tuple[str, str, str]:
        """Its line in the table."""
        return self.architecture, str(self.call), self.entry.name

    @property
    def fingerprint(self) -> str:
        """Changes with all that the line depends on."""
        both = self.launch.fingerprint + ("" if self.plain is None else self.plain.fingerprint)
        return hashlib.sha256(both.encode()).hexdigest()[:16]


def works_of(call: Call, architecture: str, chosen: str | None = None, tile: Tile | None = None) -> list[Work]:
    """The kernels of a call; `chosen` limits them to one entry, `tile` replaces the table's configuration."""
    problem = problem_of(call.shape, **call.options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(call.precision)
    try:
        launches = launches_of(problem, architecture, _choice(call, tile))
    finally:
        torch.set_float32_matmul_precision(before)
    found: dict[str, Work] = {}
    for launch in launches:
        entry = entry_of(launch)
        listed = entry.name == chosen if chosen else not call.kernels or entry.name in call.kernels
        if listed and entry.name not in found:
            plain = None
            if entry.plain is not None and call.compared:
                precision = launch.constant("PRECISION")
                plain = plain_launch(entry.plain, problem, architecture, launch.tile, precision)
            found[entry.name] = Work(architecture, call, entry, launch, plain)
    return list(found.values())


def _choice(call: Call, tile: Tile | None) -> Callable[[Device, Kind], Tiles] | None:
    if tile is not None:
        return lambda device, kind: every_kernel(tile)
    return (lambda device, kind: safe_tiles(kind.block_d)) if call.safe else None


def row_of(work: Work) -> Row:
    """Compile a kernel, and the plain one beside it."""
    kernel = work.launch.compile()
    code = analyse(kernel, work.entry.multiplies)
    tile, shared = work.launch.tile, kernel.metadata.shared
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    return Row(
        *work.name, tuple(tile), code.registers, code.stack, code.spills, code.spills_in_loops, shared,
        programs_together(work.architecture, tile.warps, code.registers, shared, columns), code.matrix,
        _loops(work, code), work.fingerprint,
    )  # fmt: skip


def _loops(work: Work, code: Code) -> dict[str, tuple[int, int, float | None]]:
    names = work.entry.loops(work.launch)
    if len(names) != len(code.loops):  # the compiler has split, merged or unrolled some
        names = tuple(f"loop {number}" for number in range(len(code.loops)))
    plain = {} if work.plain is None else _plain_loops(work.plain)
    loops = {}
    for name, loop in zip(names, code.loops, strict=True):
        rival = plain.get(COUNTERPARTS.get(name, ""))
        ratio = None
        if rival is not None:
            ratio = round((loop.instructions / loop.work) / (rival.instructions / rival.work), 3)
        loops[name] = (loop.instructions, loop.matrix, ratio)
    return loops


_PLAIN: dict[str, dict[str, Loop]] = {}  # several rows have the same rival


def _plain_loops(launch: Launch) -> dict[str, Loop]:
    if launch.fingerprint not in _PLAIN:
        loops, names = analyse(launch.compile(), True).loops, PLAIN_LOOPS[launch.kernel]
        if len(loops) == 1:  # the diagonal is a single tile
            names = ("own",)
        _PLAIN[launch.fingerprint] = dict(zip(names, loops, strict=True)) if len(names) == len(loops) else {}
    return _PLAIN[launch.fingerprint]


def programs_together(architecture: str, warps: int, registers: int, shared: int, columns: int) -> int:
    """How many programs a multiprocessor runs at a time."""
    limits = LIMITS[architecture]
    rounded = -(-registers // 8) * 8
    if architecture.startswith("gfx"):
        by_registers = 4 * min(8, REGISTERS_OF_LANE // rounded) // warps
    else:
        by_registers = REGISTERS // (rounded * 32 * warps)
    by_shared = limits.shared_total // (shared + limits.reserved) if shared else limits.programs
    by_columns = TENSOR_COLUMNS // columns if columns else limits.programs
    return min(by_registers, by_shared, by_columns, limits.warps // warps, limits.programs)


def faults_of(row: Row) -> list[str]:
    """What is wrong with a compiled kernel, in a few words each."""
    queries, keys, warps, _ = row.tile
    limits, faults = LIMITS[row.architecture], []
    call = call_named(row.call)
    if call.option:
        return faults
    if row.spills_in_loops:
        faults.append(f"{row.spills_in_loops} spills in loops")
    if row.stack > LARGEST_STACK:
        faults.append(f"stack {row.stack}")
    if row.shared > limits.shared:
        faults.append(f"shared {row.shared} > {limits.shared}")
    if not entry_named(row.kernel).multiplies:
        return faults
    if max(queries, keys) >= 64 and row.registers < LEAST_REGISTERS:
        faults.append(f"{row.registers} registers")
    if row.occupancy * warps < limits.least_warps:
        faults.append(f"{row.occupancy * warps} resident warps < {limits.least_warps}")
    if not row.matrix and not call.without_matrix_cores:
        faults.append("no matrix instructions")
    if any(name.startswith("loop") for name in row.loops):
        faults.append(f"{len(row.loops)} loops")
    for name, (_, _, ratio) in row.loops.items():
        if name in UNMASKED and ratio is None and call.compared:
            faults.append(f"{name} has no counterpart")
        elif name in UNMASKED and call.compared and ratio > largest_ratio(row):
            faults.append(f"{name} {ratio:.3f} × plain")
        if cost_of(row, name) > SAME_COST * cost_of(row, UNMASKED.get(name, "")):
            faults.append(f"{name} costs more than with its mask")
    return faults


def cost_of(row: Row, loop: str) -> float:
    """Instructions per matrix instruction; of a loop that is not there, infinity."""
    instructions, matrix, _ = row.loops.get(loop, (math.inf, 1, None))
    return instructions / matrix


def largest_ratio(row: Row) -> float:
    """Instructions per matrix instruction that an unmasked loop may have, against the plain kernel's."""
    on_sm_90 = row.architecture == "sm_90" and row.kernel == "dq"
    return LARGEST_RATIO_OF_DQ_ON_SM_90 if on_sm_90 else LARGEST_RATIO
