"""The CUDA kernels compiled as the package compiles them, and what their machine code is like.

One fat binary of a source and a type of products holds the code of every architecture; the cuobjdump that Triton ships
takes it apart.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from machine_code import Instruction, is_matrix, is_multiply_add, is_spill, natural_loops, parse_sass
from triton import knobs

from prefix_fast.cuda_build import FLAGS, KERNELS, TYPES, Toolkit

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HALF = ("fp16", "bf16")
UNITS = tuple((kernel, kind) for kernel in KERNELS for kind in TYPES if kernel != "short_prefix" or kind in HALF)
_TEMPLATE = re.compile(r"\d+(?P<name>[a-z_]+)_kernelI(?P<shape>.*?(?:Li(?P<D>\d+)E)?.*?)(?P<flags>(?:Lb[01]E)*)EEv")


class Kernel(NamedTuple):
    """One kernel of a fat binary. `flags`: the template's last arguments, those after its shape."""

    name: str
    head_dim: int  # 0: of any
    flags: tuple[bool, ...]


class Code(NamedTuple):
    """Figures of a kernel. `loops`: (instructions, matrix instructions) of each loop over tiles, as the code has them.

    Float32 products have a loop over the head dim within that over tiles, whose turns are counted; there multiply-adds
    stand for matrix instructions.
    """

    registers: int
    stack: int  # bytes of local memory per thread
    spills: int  # local loads and stores
    spills_in_loops: int
    threads: int
    loops: tuple[tuple[int, int], ...]


def compile_unit(toolkit: Toolkit, kernel: str, kind: str, architectures: Sequence[int], target: Path) -> None:
    """Compile a source for a type of products and write the fat binary; CalledProcessError with nvcc's messages."""
    codes = f"arch=compute_{architectures[0]},code=[{','.join(f'sm_{a}' for a in architectures)}]"
    command = [toolkit.nvcc, *FLAGS, "-gencode", codes, "-I", SOURCES, f"-DPREFIX_FAST_TYPE={kind}", "-fatbin",
               SOURCES / f"{kernel}.cu", "-o", target]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


def codes_of(toolkit: Toolkit, kernel: str, kind: str, architectures: Sequence[int]) -> dict[int, dict[Kernel, Code]]:
    """The figures of every kernel of a source, by architecture."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.fatbin"
        compile_unit(toolkit, kernel, kind, architectures, binary)
        return {architecture: _codes(binary, architecture, kind) for architecture in architectures}


def _codes(binary: Path, architecture: int, kind: str) -> dict[Kernel, Code]:
    def dump(option: str) -> str:
        command = [knobs.nvidia.cuobjdump.path, "-arch", f"sm_{architecture}", option, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", dump("-res-usage")))
    threads = {
        symbol: int(size, 16)
        for symbol, size in re.findall(
            r"\.nv\.info\.(_Z\S+)\n(?:(?!\.nv\.info\.).*\n)*?.*EIATTR_MAX_THREADS\n.*\n.*Value:\s*(0x[0-9a-f]+)",
            dump("-elf"),
        )
    }
    found = {}
    for part in dump("-sass").split("Function : ")[1:]:
        symbol = part.split()[0]
        kernel = kernel_of(symbol)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage[symbol])[1]) for name in ("REG", "STACK"))
        program = parse_sass(part)
        bodies = natural_loops(program)
        looping = set().union(*bodies)
        turns = kernel.head_dim // 4 if kind == "fp32" else 1
        found[kernel] = Code(
            registers, stack, sum(map(is_spill, program)), sum(is_spill(program[i]) for i in looping), threads[symbol],
            tuple(tile_loops(program, bodies, turns)),
        )  # fmt: skip
    return found


def kernel_of(symbol: str) -> Kernel:
    """What a kernel's mangled name says; LookupError where it is none of ours."""
    match = _TEMPLATE.search(symbol)
    if match is None:
        raise LookupError(f"{symbol} is not a kernel of prefix_fast")
    flags = tuple(flag == "1" for flag in re.findall(r"Lb([01])E", match["flags"]))
    dims = re.findall(r"Li(\d+)E", match["shape"])
    return Kernel(match["name"], int(dims[0]) if dims else 0, flags)


def tile_loops(program: Sequence[Instruction], bodies: list[frozenset[int]], turns: int) -> list[tuple[int, int]]:
    """Instructions and products of one turn of each loop over tiles; loops of products alone within it have `turns`."""
    counted = is_matrix if any(map(is_matrix, program)) else is_multiply_add
    holding = [body for body in bodies if any(counted(program[i]) for i in body)]
    inner = [body for body in holding if not any(other < body for other in holding)]
    if turns == 1:
        return [(len(body), sum(counted(program[i]) for i in body)) for body in inner]
    around = [body for body in holding if body not in inner]
    loops = []
    for body in around:
        if any(other < body for other in around):
            continue
        within = [other for other in inner if other < body]
        sizes = [len(body) + (turns - 1) * sum(map(len, within))]
        sizes.append(sum((turns if any(i in o for o in within) else 1) * counted(program[i]) for i in body))
        loops.append((sizes[0], sizes[1]))
    return loops


def fingerprint(kernel: str, kind: str) -> str:
    """Changes with all that the code depends on but nvcc: sources without comments and layout, type, flags."""
    digest = hashlib.sha256(f"{kind} {FLAGS} {ARCHITECTURES}".encode())
    for path in (SOURCES / f"{kernel}.cu", *sorted(SOURCES.glob("*.cuh")), SOURCES / "call.h", SOURCES / "plan.h"):
        digest.update(" ".join(words_of(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def words_of(source: str) -> list[str]:
    """A C++ source's words, comments left out."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL).split()
