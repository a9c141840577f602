"""The machine code of every instruction set, those that this CPU lacks included: what is in it, what must not be.

A product is an innermost loop of multiply-adds on the level's widest vectors. Its sums have to stay in registers: a
single vector that goes to the stack and back costs more than the arithmetic beside it.
"""

import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from prefix_fast.backends import native

X86 = platform.machine().lower() in ("x86_64", "amd64")
needs_objdump = pytest.mark.skipif(not X86 or shutil.which("objdump") is None, reason="objdump of x86-64 is missing")

INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\s+(\S+)\s*([^#<]*)")
FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:")
ELEMENTWISE = "5Gated"  # in the names of loops over polynomials, which have no sums to keep
OURS = ("_ZN11prefix_fast", "_ZZN11prefix_fast", "_ZNK11prefix_fast")

EVEX = r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"  # registers that only AVX-512 has
BFLOAT16 = r"\bvdpbf16ps|\bvcvtne2?ps2?.*bf16"


class Level(NamedTuple):
    """What the code of one instruction set has and has not; `multiply_add` counts the work of a loop."""

    multiply_add: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    full_tile: int  # multiply-adds of one step of the largest product


LEVELS = {
    "generic": Level(r"\bmulps .*%xmm", (r"\baddps .*%xmm",), (r"\bv\w+ ", "%[yz]mm", EVEX), 12),
    "avx2": Level(r"\bvfn?madd\w+ps .*%ymm", (r"\bvfmadd\w+ps .*%ymm", r"\bvcvtph2ps "), (EVEX, BFLOAT16), 12),
    "avx512": Level(r"\bvfmadd\w+ps .*%zmm", (r"\bvfmadd\w+ps .*%zmm", r"\bvcvtph2ps "), (BFLOAT16,), 24),
    "avx512_bf16": Level(
        r"\b(vfmadd\w+ps|vdpbf16ps) .*%zmm",
        (r"\bvfmadd\w+ps .*%zmm", r"\bvdpbf16ps .*%zmm", r"\bvcvtne2ps2bf16 .*%zmm"),
        (),
        24,
    ),
}


def disassembled(level: str) -> dict[str, list[tuple[int, str]]]:
    """Function → (address, instruction)."""
    spec = find_spec(f"prefix_fast._native_{level}")
    assert spec is not None and spec.origin is not None, f"prefix_fast._native_{level} was not built"
    return functions(("objdump", "-d", "--no-show-raw-insn", spec.origin))


@cache
def functions(command: tuple[str, ...]) -> dict[str, list[tuple[int, str]]]:
    listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if start := FUNCTION.match(line):
            body = found.setdefault(start[1], [])
        elif instruction := INSTRUCTION.match(line):
            body.append((int(instruction[1], 16), f"{instruction[2]} {instruction[3].strip()}"))
    return found


def innermost_loops(body: list[tuple[int, str]]) -> list[list[str]]:
    """Instructions between a backward jump's target and the jump, where no other such pair lies within."""
    index = {address: i for i, (address, _) in enumerate(body)}
    spans = set()
    for i, (address, instruction) in enumerate(body):
        jump = re.match(r"j\w+ ([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) <= address and int(jump[1], 16) in index:
            spans.add((index[int(jump[1], 16)], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[instruction for _, instruction in body[first : last + 1]] for first, last in inner]


def count(pattern: str, instructions: list[str]) -> int:
    return sum(re.search(pattern, instruction) is not None for instruction in instructions)


class Product(NamedTuple):
    """A loop of at least eight multiply-adds: a tile, or the rest of one."""

    function: str
    multiply_adds: int
    stack: list[str]  # its instructions that reach the stack


def products(level: str) -> list[Product]:
    found = []
    for name, body in disassembled(level).items():
        if not name.startswith(OURS) or ELEMENTWISE in name:
            continue
        framed = any(instruction == "mov %rsp,%rbp" for _, instruction in body)
        on_stack = r"\(%r[sb]p\b" if framed else r"\(%rsp\b"
        for loop in innermost_loops(body):
            multiply_adds = count(LEVELS[level].multiply_add, loop)
            if multiply_adds >= 8:
                found.append(Product(name, multiply_adds, [i for i in loop if re.search(on_stack, i)]))
    return found


@needs_objdump
@pytest.mark.parametrize("level", native.LEVELS)
def test_instructions_are_those_of_the_level(level):
    code = [instruction for body in disassembled(level).values() for _, instruction in body]
    for pattern in LEVELS[level].present:
        assert count(pattern, code) > 0, f"no {pattern}"
    for pattern in LEVELS[level].absent:
        assert not (found := [i for i in code if re.search(pattern, i)]), f"{level} has {found[:3]}"


@needs_objdump
@pytest.mark.parametrize("level", native.LEVELS[1:])
def test_products_keep_their_sums_in_registers(level):
    """No vector on the stack and nothing written there; an address or a bound is read in one of three multiply-adds."""
    found = products(level)
    assert max(product.multiply_adds for product in found) >= LEVELS[level].full_tile
    for product in found:
        assert count("%[xyz]mm", product.stack) == 0, product
        assert all(re.match(r"cmp|test", i) for i in product.stack if i.endswith("p)")), product
        assert 3 * len(product.stack) <= product.multiply_adds, product


@needs_objdump
def test_the_generic_tile_keeps_its_sums_in_registers():
    """Sixteen registers of four floats hold the six rows by two vectors of a whole tile; smaller rests may spill."""
    whole = [p for p in products("generic") if p.multiply_adds == LEVELS["generic"].full_tile and "strip" in p.function]
    assert whole
    assert not any(count("%xmm", product.stack) for product in whole)


def aarch64_compiler() -> list[str] | None:
    if shutil.which("aarch64-linux-gnu-g++"):
        return ["aarch64-linux-gnu-g++"]
    if find_spec("ziglang"):
        return [sys.executable, "-I", "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.slow
@pytest.mark.parametrize("source", ["forward", "backward"])
def test_kernels_compile_for_aarch64_with_neon(source, root, tmp_path):
    objdump = shutil.which("aarch64-linux-gnu-objdump") or shutil.which("llvm-objdump")
    compiler = aarch64_compiler()
    if compiler is None or objdump is None:
        pytest.skip("needs aarch64-linux-gnu-g++ or ziglang, and an objdump for aarch64")
    made: Path = tmp_path / f"{source}.o"
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
    subprocess.run([*compiler, *flags, "-c", root / f"csrc/cpu/{source}.cpp", "-o", made], check=True, timeout=600)
    listing = subprocess.run([objdump, "-d", made], check=True, capture_output=True, text=True, timeout=300).stdout
    assert re.search(r"\bfmla\s+v\d+\.4s", listing)
