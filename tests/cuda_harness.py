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
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda_compile import EMULATOR
from random_calls import laid_out
from torch import Tensor

MARGIN = 4096  # bytes between buffers: an access beyond one is never an access to another

CHECKS = (
    "out of bounds", "misaligned", "uninitialised read", "race", "barrier divergence", "warp divergence",
    "missing wait", "in flight at exit", "shared memory limit", "launch limit", "read-only write", "runaway",
)  # fmt: skip

# Dynamic shared memory that a block may ask for.
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


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


class CaughtError(AssertionError):
    """A check has failed: its name, and what it says."""

    def __init__(self, check: str, text: str) -> None:
        super().__init__(text)
        self.check = check


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


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    """The library, told where its shared variables lie: thread-local symbols, whose values are offsets."""
    loaded = ctypes.CDLL(str(library))
    elf = subprocess.run(["readelf", "-sW", "-C", library], capture_output=True, text=True, check=True).stdout
    for line in elf.splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == "TLS" and fields[6] != "UND" and "pybind11::" not in fields[7]:
            loaded.cuda_emulator_add_shared(
                ctypes.c_uint64(int(fields[1], 16)), ctypes.c_uint64(int(fields[2], 0)), fields[7].encode()
            )
    return loaded


_lines: dict[tuple[Path, int], tuple[str, ...]] = {}  # by library and return address


def source_lines(library: Path, places: list[int]) -> list[tuple[str, ...]]:
    """The lines of return addresses in a library, each with the calls that were inlined, the innermost first."""
    unknown = sorted({place for place in places if (library, place) not in _lines})
    if unknown:
        command = ["addr2line", "-a", "-i", "-e", str(library), *(hex(place - 1) for place in unknown)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for place, block in zip(unknown, re.split(r"^0x[0-9a-f]+\n", found, flags=re.MULTILINE)[1:], strict=True):
            parts = [line.rpartition(":") for line in block.splitlines()]
            _lines[library, place] = tuple(f"{Path(file).name}:{number.split()[0]}" for file, _, number in parts)
    return [_lines[library, place] for place in places]


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
        self.ran = ""  # a caller's note of the kernels that it launched

    def input(self, tensor: Tensor, name: str, layout: str = "dense") -> Tensor:
        """A copy, laid out so, that a kernel may read."""
        return laid_out(tensor, layout, lambda count: self._memory(count, tensor.dtype, name, writable=False))

    def writable(self, tensor: Tensor, name: str) -> Tensor:
        """A dense copy that a kernel may also write."""
        return laid_out(tensor, "dense", lambda count: self._memory(count, tensor.dtype, name, writable=True))

    def uninitialised(self, like: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A dense tensor of that shape and order of dimensions, which a kernel must write before it reads it."""
        dense = torch.empty_like(like, dtype=dtype)
        memory = self._memory(dense.numel(), dense.dtype, name, writable=True, written=False)
        return memory.as_strided(dense.shape, dense.stride())

    def _memory(self, count: int, dtype: torch.dtype, name: str, *, writable: bool, written: bool = True) -> Tensor:
        """`count` elements whose bits are all set, far from any other buffer."""
        size = count * dtype.itemsize
        raw = torch.full((size + 2 * MARGIN + 256,), 255, dtype=torch.uint8)
        first = MARGIN + -(raw.data_ptr() + MARGIN) % 256
        self._memories.append(raw)
        elements = raw[first : first + size].view(dtype)
        if count > 0:
            begin = ctypes.c_uint64(elements.data_ptr())
            self._loaded.cuda_emulator_add_buffer(
                begin, ctypes.c_uint64(size), name.encode(), int(writable), int(written)
            )
        return elements

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
        lines = source_lines(self.library, [raw.place])[0] if raw.place else ()
        own = [at for at in lines if at.partition(":")[0] not in _wrappers()]
        file, _, line = own[0].rpartition(":") if own else ("", "", "0")
        number = int(line) if line.isdigit() else 0
        return Finding(CHECKS[raw.check], file, number, tuple(raw.block), tuple(raw.thread), raw.text.decode(),
                       raw.size, raw.times, lines)  # fmt: skip

    def assert_clean(self) -> None:
        """Raise `CaughtError` where a check has found something."""
        findings = self.findings
        if findings:
            raise CaughtError(findings[0].check, "\n".join(map(str, findings)))

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
        lines = source_lines(self.library, [t.place for t in raw])
        return [Traffic(at, *(getattr(t, n) for n in Traffic._fields[1:])) for at, t in zip(lines, raw, strict=True)]


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value if value is not None else ctypes.c_void_p(None)
