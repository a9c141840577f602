"""What machine code says about a kernel: registers, stack, spills, matrix instructions, and all of it loop by loop.

The cuobjdump that Triton ships disassembles NVIDIA kernels; AMD assembly comes with the compiled kernel. Loops are the
natural loops of the control-flow graph, so waiting loops that the compiler moves out of line are counted where they
belong.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel

_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\*")
_SASS_NAME = re.compile(r"^(@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SASS_MATRIX = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA|QMMA|QGMMA)\b")
_SASS_SHAPE = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)|^HMMA\.(\d+?)(8)(4|8|16)\.")
_AMD_SHAPE = re.compile(r"^v_mfma_\w+?_(\d+)x(\d+)x(\d+)")


class Instruction(NamedTuple):
    """One instruction; where it can jump to, and whether what follows it can be reached from it."""

    name: str
    text: str
    target: int | None
    falls_through: bool


@dataclass(frozen=True)
class Loop:
    """A loop that holds matrix instructions, and no other loop that does."""

    instructions: int
    matrix: int
    work: float  # multiply-accumulates of the matrix instructions; their number where they do not name their shape


@dataclass(frozen=True)
class Code:
    """Figures of one compiled kernel."""

    registers: int
    stack: int  # bytes of local memory (scratch on AMD) per thread
    spills: int  # local loads and stores
    spills_in_loops: int
    matrix: int  # instructions for tensor or matrix cores
    loops: tuple[Loop, ...]  # in the order of the code


def analyse(kernel: CompiledKernel, products: bool) -> Code:
    """The figures of a compiled kernel. One without products and without a stack has no loop or spill to be found."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            registers, stack = usage_of(cuobjdump(file.name, "-res-usage"))
            program = parse_sass(cuobjdump(file.name, "-sass")) if products or stack else []
    else:
        listing = kernel.asm["amdgcn"]
        program = parse_amd(listing)
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", listing)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", listing)[1])
    bodies = natural_loops(program) if program else []
    return Code(
        registers, stack, *spills_of(program, bodies), sum(map(is_matrix, program)),
        tuple(matrix_loops(program, bodies)),
    )  # fmt: skip


def cuobjdump(file: str | Path, *options: str) -> str:
    """What the cuobjdump that Triton ships says about a binary."""
    command = [knobs.nvidia.cuobjdump.path, *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_of(text: str) -> tuple[int, int]:
    """(registers, bytes of stack) of the first kernel of a listing of resources."""
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack


def spills_of(program: Sequence[Instruction], bodies: list[frozenset[int]]) -> tuple[int, int]:
    """Local loads and stores, and those of them in loops."""
    looping = set().union(*bodies)
    return sum(map(is_spill, program)), sum(is_spill(program[i]) for i in looping)


def parse_sass(listing: str) -> list[Instruction]:
    """The first function of a disassembly."""
    lines = [(int(m[1], 16), m[2]) for m in map(_SASS.match, listing.splitlines()) if m]
    index = {address: position for position, (address, _) in enumerate(lines)}
    program = []
    for _, text in lines:
        predicate, name = _SASS_NAME.match(text).groups()
        operands = text[text.index(name) + len(name) :]
        target, falls = None, True
        if name.split(".")[0] in ("BRA", "JMP"):
            target = index.get(int(re.search(r"0x[0-9a-f]+", operands)[0], 16))
            falls = predicate is not None or re.search(r"\bU?P\d", operands) is not None
        elif name.split(".")[0] in ("EXIT", "RET"):
            falls = predicate is not None
        program.append(Instruction(name, text, target, falls))
    return program


def parse_amd(listing: str) -> list[Instruction]:
    """The kernel in an assembly listing."""
    labels: dict[str, int] = {}
    lines = []
    for raw in listing.splitlines():
        line = raw.split(";")[0].split("//")[0].strip()
        if re.fullmatch(r"\.L\w+:", line):
            labels[line[:-1]] = len(lines)
        elif re.match(r"^(s|v|ds|buffer|global|scratch|flat)_\w+", line):
            lines.append(line)
        elif line.startswith(".amdhsa_kernel"):
            break
    program = []
    for line in lines:
        name = line.split()[0]
        jumps = name == "s_branch" or name.startswith("s_cbranch")
        target = labels.get(line.split()[1]) if jumps else None
        program.append(Instruction(name, line, target, name not in ("s_branch", "s_endpgm")))
    return program


def is_matrix(instruction: Instruction) -> bool:
    """Whether it runs on tensor or matrix cores."""
    return bool(_SASS_MATRIX.match(instruction.name)) or instruction.name.startswith(("v_mfma", "v_smfmac"))


def is_multiply_add(instruction: Instruction) -> bool:
    """Whether it is a float32 multiply-add."""
    return instruction.name.startswith(("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32"))


def is_spill(instruction: Instruction) -> bool:
    """Whether it reads or writes local (scratch) memory."""
    return instruction.name.split(".")[0] in ("LDL", "STL") or instruction.name.startswith("scratch_")


def work_of(instruction: Instruction) -> float:
    """Multiply-accumulates of one matrix instruction; 1 where its name does not tell."""
    match = _SASS_SHAPE.match(instruction.name) or _AMD_SHAPE.match(instruction.name)
    if match is None:
        return 1.0
    m, n, k = (int(size) for size in match.groups() if size is not None)
    return float(m * n * k)


def natural_loops(program: Sequence[Instruction]) -> list[frozenset[int]]:
    """The bodies of all loops, as positions of instructions, in the order of their first instruction."""
    starts = sorted(
        {0}
        | {i.target for i in program if i.target is not None}
        | {n + 1 for n, i in enumerate(program[:-1]) if i.target is not None or not i.falls_through}
    )
    block_at = {start: number for number, start in enumerate(starts)}
    ends = [*starts[1:], len(program)]
    successors: list[list[int]] = []
    for end in ends:
        last = program[end - 1]
        following = [block_at[end]] if last.falls_through and end < len(program) else []
        successors.append(following + ([block_at[last.target]] if last.target is not None else []))
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in successors[block]:
            predecessors[following].append(block)
    dominators = _dominators(order, predecessors)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if header in dominators[block]:
                body = bodies.setdefault(header, {header})
                todo = [block]
                while todo:
                    member = todo.pop()
                    if member not in body:
                        body.add(member)
                        todo.extend(predecessors[member])
    loops = [
        frozenset(position for block in body for position in range(starts[block], ends[block]))
        for body in bodies.values()
    ]
    return sorted(loops, key=min)


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    seen, order, stack = {0}, [], [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(successors[successor])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def _dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
    dominators = {block: set(order) for block in order}
    dominators[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            found = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def matrix_loops(program: Sequence[Instruction], bodies: list[frozenset[int]]) -> list[Loop]:
    """The innermost loops among those that hold matrix instructions; fused multiply-adds in a program without any."""
    counted, holding = holding_loops(program, bodies)
    loops = []
    for body in innermost(holding):
        matrix = [program[i] for i in body if counted(program[i])]
        loops.append(Loop(len(body), len(matrix), sum(map(work_of, matrix))))
    return loops


def holding_loops(
    program: Sequence[Instruction], bodies: list[frozenset[int]]
) -> tuple[Callable[[Instruction], bool], list[frozenset[int]]]:
    """What counts as a product in a program, and the loops that hold some."""
    counted = is_matrix if any(map(is_matrix, program)) else is_multiply_add
    return counted, [body for body in bodies if any(counted(program[i]) for i in body)]


def innermost(bodies: list[frozenset[int]]) -> list[frozenset[int]]:
    """Those that hold no other."""
    return [body for body in bodies if not any(other < body for other in bodies)]
