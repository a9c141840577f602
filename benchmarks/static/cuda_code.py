"""The CUDA kernels compiled as the package compiles them, and what their machine code is like.

One fat binary of a source and a type of products holds the code of every architecture; the cuobjdump that Triton ships
takes it apart.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from machine_code import (
    Instruction,
    cuobjdump,
    holding_loops,
    innermost,
    matrix_loops,
    natural_loops,
    parse_sass,
    spills_of,
    usage_of,
)

from prefix_fast.cuda_build import FLAGS, KERNELS, TYPES, Toolkit, codes_for

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HALF = ("fp16", "bf16")
UNITS = tuple((kernel, kind) for kernel in KERNELS for kind in TYPES if kernel != "short_prefix" or kind in HALF)
_TEMPLATE = re.compile(r"\d+(?P<name>[a-z_]+)_kernelI(?P<shape>.*?)(?P<flags>(?:Lb[01]E)*)EEv")
_THREADS = re.compile(  # of a block, by symbol
    r"\.nv\.info\.(_Z\S+)\n(?:(?!\.nv\.info\.).*\n)*?.*EIATTR_MAX_THREADS\n.*\n.*Value:\s*(0x[0-9a-f]+)"
)


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
    command = [toolkit.nvcc, *FLAGS, "-gencode", codes_for(architectures), "-I", SOURCES, f"-DPREFIX_FAST_TYPE={kind}",
               "-fatbin", SOURCES / f"{kernel}.cu", "-o", target]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


def codes_of(toolkit: Toolkit, kernel: str, kind: str, architectures: Sequence[int]) -> dict[int, dict[Kernel, Code]]:
    """The figures of every kernel of a source, by architecture."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.fatbin"
        compile_unit(toolkit, kernel, kind, architectures, binary)
        return {architecture: _codes(binary, architecture, kind) for architecture in architectures}


def _codes(binary: Path, architecture: int, kind: str) -> dict[Kernel, Code]:
    dump = functools.partial(cuobjdump, binary, "-arch", f"sm_{architecture}")
    usage = dict(re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", dump("-res-usage")))
    threads = dict(_THREADS.findall(dump("-elf")))
    found = {}
    for part in dump("-sass").split("Function : ")[1:]:
        symbol = part.split()[0]
        kernel, program = kernel_of(symbol), parse_sass(part)
        bodies = natural_loops(program)
        found[kernel] = Code(
            *usage_of(usage[symbol]), *spills_of(program, bodies), int(threads[symbol], 16),
            tuple(tile_loops(program, bodies, kernel.head_dim if kind == "fp32" else 0)),
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


def tile_loops(program: Sequence[Instruction], bodies: list[frozenset[int]], dims: int) -> list[tuple[int, int]]:
    """Instructions and products of one turn of each loop over tiles.

    `dims`: how far the loops of products within it count, each by steps of its own; 0: there are none.
    """
    if dims == 0:
        return [(loop.instructions, loop.matrix) for loop in matrix_loops(program, bodies)]
    counted, holding = holding_loops(program, bodies)
    inner = innermost(holding)
    loops = []
    for body in innermost([body for body in holding if body not in inner]):
        more = {i: _turns(program, other, dims) - 1 for other in inner if other < body for i in other}
        products = sum((1 + more.get(i, 0)) * counted(program[i]) for i in body)
        loops.append((len(body) + sum(more.values()), products))
    return loops


def _turns(program: Sequence[Instruction], body: frozenset[int], dims: int) -> int:
    """Of a loop of products, by the register in it that is compared with `dims`, and what is added to it.

    A loop that writes results is that of the merge, whose turns are not known.
    """
    texts = [program[i].text for i in body]
    if any("STG" in text for text in texts):
        return 1
    bounds = {match[1] for text in texts if (match := re.search(rf"ISETP\S* \w+, \w+, (\w+), {dims:#x},", text))}
    added = (re.search(r"ADD3? (\w+), (?:U?PT, U?PT, )?\1, (0x\w+)", text) for text in texts)
    steps = [int(match[2], 16) for match in added if match and match[1] in bounds]
    if len(steps) != 1:
        raise LookupError(f"a loop of products has no counter up to {dims}: {texts}")
    return dims // steps[0]


def fingerprint(kernel: str, kind: str) -> str:
    """Changes with all that the code depends on but nvcc: sources without comments and layout, type, flags."""
    digest = hashlib.sha256(f"{kind} {FLAGS} {ARCHITECTURES}".encode())
    for path in (SOURCES / f"{kernel}.cu", *sorted(SOURCES.glob("*.cuh")), SOURCES / "call.h", SOURCES / "plan.h"):
        digest.update(" ".join(words_of(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def words_of(source: str) -> list[str]:
    """A C++ source's words, comments left out."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL).split()
