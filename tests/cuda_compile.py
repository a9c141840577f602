"""CUDA sources compiled by g++ over tests/cuda_emulator; each object is kept in build/cuda_emulator for its content."""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parent.parent
EMULATOR, KERNELS = ROOT / "tests" / "cuda_emulator", ROOT / "csrc" / "cuda"
TYPES = ("fp16", "bf16", "fp32", "tf32")  # of the products of csrc/cuda
MOST_TF32 = 128  # the head dim beyond which a call that asks for tf32 runs the products of fp32
BUILD = ROOT / "build" / "cuda_emulator"

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
    missing = [program for program in ("g++", "gcc", "nm", "readelf", "addr2line") if shutil.which(program) is None]
    return f"{', '.join(missing)} not found" if missing else ""


def compiled(source: Path) -> Path:
    """The shared object of one source."""
    return _linked(source.stem, [_kernel_object(source, KERNELS, ())])


def kernels_module(
    products: str, head_dims: Sequence[int], changed: Path | None = None, changed_sources: Sequence[str] = ()
) -> Path:
    """The library's kernels for one type of products, and their host code, as the Python module `emulated`.

    `changed` is a folder like csrc/cuda, from which those sources are taken; all others are the library's own.
    """
    dims = f"PREFIX_FAST_HEAD_DIMS={' '.join(f'X({d})' for d in head_dims)}"
    # The changed ones first: of two functions of one name a linker takes the first.
    names = sorted((path.stem for path in KERNELS.glob("*.cu")), key=lambda name: (name not in changed_sources, name))
    folders = [changed if changed and name in changed_sources else KERNELS for name in names]
    types = [products, "fp32"] if products == "tf32" and max(head_dims) > MOST_TF32 else [products]
    jobs = [
        functools.partial(_kernel_object, folder / f"{name}.cu", folder, (f"PREFIX_FAST_TYPE={kind}", dims))
        for kind in types
        for name, folder in zip(names, folders, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: job(), [_bindings, *jobs]))
    return _linked("emulated", [*objects, _absent(types, objects[0])])


def _absent(types: Sequence[str], bindings: Path) -> Path:
    """Launchers of the other types of products, which the host code names: a call of one ends the process."""
    symbols = subprocess.run(["nm", "-u", str(bindings)], capture_output=True, text=True, check=True).stdout.split()
    others = [name for name in symbols if name.rpartition("_")[2] in set(TYPES) - set(types)]

    def make(target: Path) -> None:
        source = target.with_suffix(".c")
        source.write_text("".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in others))
        run("gcc", "-fPIC", "-fvisibility=hidden", "-c", source, "-o", target)

    return _made("absent", ".o", [], others, make)


def _kernel_object(source: Path, headers: Path, defines: tuple[str, ...]) -> Path:
    """A kernel's source, each of whose accesses calls the emulator."""
    flags = (*COMMON_FLAGS, *KERNEL_FLAGS, f"-I{headers}", *(f"-D{d}" for d in defines))
    content = [source, *sorted(headers.glob("*.*h")), *sorted(source.parent.glob("*.h"))]
    return _made(source.stem, ".o", [*content, *_emulator_headers()], [*COMMON_FLAGS, *KERNEL_FLAGS, *defines],
                 lambda target: run("g++", *flags, "-c", source, "-o", target))  # fmt: skip


def _bindings() -> Path:
    """The host code that Python calls."""
    source = KERNELS / "bindings.cpp"
    content = [source, *sorted(KERNELS.glob("*.h")), *sorted(KERNELS.parent.glob("*.h"))]
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DPREFIX_FAST_MODULE=emulated")
    return _made("bindings", ".o", content, [*flags, *includes],
                 lambda target: run("g++", *flags, *includes, "-c", source, "-o", target))  # fmt: skip


@functools.cache
def _emulator() -> Path:
    """The emulator itself, as one translation unit."""
    sources = sorted(EMULATOR.glob("*.cpp"))

    def make(target: Path) -> None:
        whole = target.with_suffix(".cpp")
        whole.write_text("".join(f'#include "{path}"\n' for path in sources))
        run("g++", *COMMON_FLAGS, "-O2", "-c", whole, "-o", target)

    return _made("emulator", ".o", [*sources, *_emulator_headers()], COMMON_FLAGS, make)


def _emulator_headers() -> list[Path]:
    return [*sorted(EMULATOR.glob("*.h")), *sorted(EMULATOR.glob("include/*.h"))]


def _linked(name: str, objects: Sequence[Path]) -> Path:
    every = [*objects, _emulator()]
    return _made(name, ".so", [], [path.name for path in every],
                 lambda target: run("g++", "-shared", "-Wl,-Bsymbolic", *every, "-o", target))  # fmt: skip


def _made(name: str, suffix: str, content: Sequence[Path], flags: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The file of that content and those flags, made once, also where several processes ask for it at once."""
    digest = hashlib.sha256(_compiler())
    for part in (*(path.read_bytes() for path in content), *(flag.encode() for flag in flags)):
        digest.update(hashlib.sha256(part).digest())
    target = BUILD / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    if target.exists():
        return target
    with _locked(target):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                make(Path(folder) / f"{name}{suffix}")
                os.replace(Path(folder) / f"{name}{suffix}", target)
    return target


@functools.cache
def _compiler() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(*command: Any) -> None:
    """A compiler's run; RuntimeError with its messages."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-8000:]}")
