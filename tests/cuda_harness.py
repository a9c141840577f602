"""CUDA sources executed on this machine: compiled by g++ over tests/cuda_emulator, run with every access checked.

    library = compiled(source)                       # a shared object, kept in build/cuda_emulator
    machine = Machine(library, seed=3)
    out = machine.uninitialised(torch.empty(16), "out")
    machine.call("launch_something", machine.copy(query, "query"), out, 16)
    machine.assert_clean()

A launch ends where it would have gone wrong; what was found says check, source line, block and thread.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EMULATOR, KERNELS = ROOT / "tests" / "cuda_emulator", ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulator"
MARGIN = 4096  # bytes between buffers: an access beyond one is never an access to another

CHECKS = (
    "out of bounds", "misaligned", "uninitialised read", "race", "barrier divergence", "warp divergence",
    "missing wait", "in flight at exit", "shared memory limit", "launch limit", "read-only write", "runaway",
)  # fmt: skip

# Dynamic shared memory that a block may ask for.
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

COMMON_FLAGS = (
    "-std=c++20", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-extern-tls-init",
    "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", f"-I{EMULATOR}", f"-I{EMULATOR / 'include'}",
)  # fmt: skip
# Accesses must stay those of the source: no vectors, no merged stores, no aliasing rules that nvcc does not apply.
KERNEL_FLAGS = (
    "-O1", "-g1", "-x", "c++", "-DPREFIX_FAST_EMULATE", "-include", "cuda_on_cpu.h", f"-I{KERNELS}",
    "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize", "-fno-store-merging", "-fno-strict-aliasing", "-ffp-contract=fast", "-Wno-unused",
)  # fmt: skip


def unavailable() -> str:
    """Why this machine cannot run the emulator; empty: it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulator's fibres are written for Linux on x86-64"
    missing = [program for program in ("g++", "readelf", "addr2line") if shutil.which(program) is None]
    return f"{', '.join(missing)} not found" if missing else ""


class Finding(NamedTuple):
    """What a check has found, at the innermost line of the kernels; `lines` has wrappers and callers as well."""

    check: str
    file: str
    line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    text: str
    size: int
    times: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        where = " < ".join(self.lines) or "the launch"
        return f"{self.check}: {where}: block {self.block}, thread {self.thread}: {self.text} ({self.times} times)"


class Traffic(NamedTuple):
    """Requests of warps at one line: passes over the banks too many, sectors of 32 bytes and how few could do."""

    lines: tuple[str, ...]
    shared_requests: int
    conflicts: int
    global_requests: int
    sectors: int
    fewest_sectors: int


class _Settings(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64), ("shared_limit", ctypes.c_uint64), ("most_accesses", ctypes.c_uint64),
        ("most_findings", ctypes.c_int), ("resident", ctypes.c_int), ("traffic", ctypes.c_bool),
    ]  # fmt: skip


class _Finding(ctypes.Structure):
    _fields_ = [
        ("check", ctypes.c_int32), ("times", ctypes.c_int32), ("place", ctypes.c_uint64), ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64), ("block", ctypes.c_int32 * 3), ("thread", ctypes.c_int32 * 3),
        ("text", ctypes.c_char * 232),
    ]  # fmt: skip


class Counters(ctypes.Structure):
    """Totals over the launches since the machine began."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("launches", "blocks", "switches", "accesses", "mma", "mma_most", "ldmatrix", "async_copies",
                     "atomics", "barriers", "shared_bytes")
    ]  # fmt: skip


class _Traffic(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("place", "shared_requests", "conflicts", "global_requests", "sectors", "fewest_sectors")
    ]


def compiled(source: Path, defines: tuple[str, ...] = (), text: str | None = None) -> Path:
    """The shared object of a kernel's source (of `text` in its place, for mutants), compiled once for what is in it."""
    headers = {path: path.read_bytes() for path in sorted(KERNELS.glob("*.cuh"))}
    content = source.read_bytes() if text is None else text.encode()
    key = _digest(content, *headers.values(), _runtime().name.encode(), *(d.encode() for d in defines), *KERNEL_FLAGS)
    target = BUILD / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        path = source
        if text is not None:
            path = Path(folder) / source.name
            path.write_text(text)
        flags = (*COMMON_FLAGS, *KERNEL_FLAGS, f"-I{source.parent}", *(f"-D{d}" for d in defines))
        _run("g++", *flags, "-c", path, "-o", f"{folder}/kernel.o")
        _run("g++", "-shared", "-Wl,-Bsymbolic", f"{folder}/kernel.o", _runtime(), "-o", f"{folder}/kernel.so")
        os.replace(f"{folder}/kernel.so", target)
    return target


@functools.cache
def _runtime() -> Path:
    """The emulator's own object."""
    sources = sorted(EMULATOR.glob("*.cpp"))
    headers = [*sorted(EMULATOR.glob("*.h")), *sorted(EMULATOR.glob("include/*.h"))]
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    target = BUILD / f"emulator-{_digest(version, *(p.read_bytes() for p in (*sources, *headers)), *COMMON_FLAGS)}.o"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            whole = Path(folder) / "emulator.cpp"
            whole.write_text("".join(f'#include "{path}"\n' for path in sources))
            _run("g++", *COMMON_FLAGS, "-O2", "-c", whole, "-o", f"{folder}/emulator.o")
            os.replace(f"{folder}/emulator.o", target)
    return target


def _digest(*parts: bytes | str) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return content.hexdigest()[:16]


def _run(*command: Any) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-8000:]}")


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    """The library, told where its shared variables lie: thread-local symbols, whose values are offsets."""
    loaded = ctypes.CDLL(str(library))
    elf = subprocess.run(["readelf", "-sW", "-C", library], capture_output=True, text=True, check=True).stdout
    for line in elf.splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == "TLS" and fields[6] != "UND":
            loaded.cuda_emulator_add_shared(
                ctypes.c_uint64(int(fields[1], 16)), ctypes.c_uint64(int(fields[2], 0)), fields[7].encode()
            )
    return loaded


@functools.cache
def source_lines(library: Path, place: int) -> tuple[str, ...]:
    """The line of a return address in a library, and the calls that were inlined, the innermost first."""
    command = ["addr2line", "-i", "-e", str(library), hex(place - 1)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(f"{Path(line.rpartition(':')[0]).name}:{line.rpartition(':')[2].split()[0]}" for line in found)


@functools.cache
def _wrappers() -> frozenset[str]:
    """Files whose lines only stand for an instruction of their caller's."""
    wrappers = ("mma.cuh", "pipeline.cuh", "memory.cuh", "launch.cuh")
    return frozenset((*wrappers, *(path.name for path in EMULATOR.rglob("*.h"))))


class Machine:
    """An emulated card that runs a library's launches and remembers what its checks found.

    `resident` blocks take turns at atomics; `traffic` counts bank conflicts and sectors of every line.
    """

    def __init__(
        self, library: Path, seed: int = 0, arch: int = 80, *, resident: int = 1, traffic: bool = False,
        most_findings: int = 8, most_accesses: int = 1 << 33,
    ) -> None:  # fmt: skip
        self.library, self._loaded = library, _load(library)
        settings = _Settings(seed, SHARED_LIMITS[arch], most_accesses, most_findings, resident, traffic)
        self._loaded.cuda_emulator_begin(ctypes.byref(settings))
        self._memories: list[Tensor] = []

    def copy(self, tensor: Tensor, name: str, *, writable: bool = False) -> Tensor:
        """The tensor, with its strides, in memory of its own; a kernel may read it, or also write it."""
        return self._memory(tensor, name, writable, True).copy_(tensor)

    def uninitialised(self, tensor: Tensor, name: str) -> Tensor:
        """Memory for a tensor like this one that a kernel must write before it reads it."""
        memory = self._memory(tensor, name, True, False)
        return memory.fill_(float("nan") if memory.is_floating_point() else -1 if memory.dtype != torch.bool else 1)

    def _memory(self, tensor: Tensor, name: str, writable: bool, written: bool) -> Tensor:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        size = tensor.element_size()
        raw = torch.zeros(reach * size + 2 * MARGIN + 256, dtype=torch.uint8)
        first = MARGIN + -(raw.data_ptr() + MARGIN) % 256
        self._memories.append(raw)
        elements = raw[first : first + reach * size].view(tensor.dtype)
        begin, reached = ctypes.c_uint64(elements.data_ptr()), ctypes.c_uint64(reach * size)
        self._loaded.cuda_emulator_add_buffer(begin, reached, name.encode(), int(writable), int(written))
        return elements.as_strided(tensor.shape, tensor.stride())

    def call(self, function: str, *arguments: Any) -> int:
        """Call a launcher of the library: tensors as pointers, None as null, int as int64, float as float32."""
        return int(getattr(self._loaded, function)(*map(_argument, arguments)))

    @property
    def findings(self) -> list[Finding]:
        """What the checks have found, in the order of finding."""
        first = ctypes.POINTER(_Finding)()
        count = self._loaded.cuda_emulator_findings(ctypes.byref(first))
        return [self._finding(first[i]) for i in range(count)]

    def _finding(self, raw: _Finding) -> Finding:
        lines = source_lines(self.library, raw.place) if raw.place else ()
        own = [at for at in lines if at.partition(":")[0] not in _wrappers()]
        file, _, line = own[0].rpartition(":") if own else ("", "", "0")
        number = int(line) if line.isdigit() else 0
        return Finding(CHECKS[raw.check], file, number, tuple(raw.block), tuple(raw.thread), raw.text.decode(),
                       raw.size, raw.times, lines)  # fmt: skip

    def assert_clean(self) -> None:
        """Raise where a check has found something."""
        findings = self.findings
        if findings:
            raise AssertionError("\n".join(map(str, findings)))

    @property
    def counters(self) -> Counters:
        """Totals over the launches."""
        counters = Counters()
        self._loaded.cuda_emulator_counters(ctypes.byref(counters))
        return counters

    @property
    def traffic(self) -> list[Traffic]:
        """Bank conflicts and sectors, by line of the source."""
        room = self._loaded.cuda_emulator_traffic(None, 0)
        raw = (_Traffic * room)()
        self._loaded.cuda_emulator_traffic(raw, room)
        counts = Traffic._fields[1:]
        return [Traffic(source_lines(self.library, t.place), *(getattr(t, name) for name in counts)) for t in raw]


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value if value is not None else ctypes.c_void_p(None)
