"""Compiles the CUDA kernels of csrc/cuda into the extension `_native_cuda`: by setup.py, or later by `build-cuda`.

It needs nvcc, and neither a card nor a CUDA build of PyTorch. Only the standard library is imported, so that setup.py
can load this file before the package exists. An object is kept in the user's cache folder under a digest of all that
it is made of, and is compiled once for all checkouts and for pip's short-lived build folders.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

VARIABLE = "PREFIX_FAST_CUDA_ARCHS"
MODULE = "_native_cuda"
KERNELS = ("forward", "decode", "backward_dq", "backward_dkv", "short_prefix")
TYPES = ("fp16", "bf16", "fp32", "tf32")
OLDEST = 80  # mma.sync with bfloat16, cp.async
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
HOST_FLAGS = ("-std=c++17", "-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")


class Toolkit(NamedTuple):
    """An installed CUDA toolkit."""

    nvcc: Path
    version: str  # what `nvcc --version` prints


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, of PATH or of /usr/local/cuda, the first that has nvcc."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [shutil.which("nvcc", path=str(Path(place) / "bin")) for place in places if place]
    for nvcc in (*found, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")):
        if nvcc is not None:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
            if version.returncode == 0:
                return Toolkit(Path(nvcc), version.stdout)
    return None


def wanted_architectures() -> tuple[int, ...]:
    """Those that PREFIX_FAST_CUDA_ARCHS names ("80,90"; empty or "none": none), else those of the cards in here.

    Raises:
        ValueError: a name is no architecture from 80 on.
    """
    given = os.environ.get(VARIABLE)
    return visible_architectures() if given is None else parse_architectures(given)


def parse_architectures(text: str) -> tuple[int, ...]:
    """(80, 90) from "80,90", "8.0;9.0" or "sm_80 sm_90".

    Raises:
        ValueError: a name is no architecture from 80 on.
    """
    names = text.replace(";", " ").replace(",", " ").split()
    if names in ([], ["none"]):
        return ()
    numbers = [name.removeprefix("sm_").replace(".", "") for name in names]
    if not all(number.isdigit() and int(number) >= OLDEST for number in numbers):
        raise ValueError(
            f"prefix_fast: expected {VARIABLE} to name architectures from {OLDEST} on, as in '80,90', got {text!r}"
        )
    return tuple(sorted({int(number) for number in numbers}))


def visible_architectures() -> tuple[int, ...]:
    """The architectures of this machine's cards, as its driver says; those older than the kernels' are left out."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    numbers = (
        {line.strip().replace(".", "") for line in answer.stdout.splitlines()} if answer.returncode == 0 else set()
    )
    return tuple(sorted(int(n) for n in numbers if n.isdigit() and int(n) >= OLDEST))


def cache_folder() -> Path:
    """Where objects are kept: PREFIX_FAST_CACHE, or prefix_fast in the user's cache folder."""
    given, shared = os.environ.get("PREFIX_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if given:
        return Path(given) / "cuda"
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "prefix_fast" / "cuda"


def codes_for(architectures: Sequence[int]) -> str:
    """nvcc's -gencode: one intermediate code serves all, as the kernels use nothing that came after the oldest."""
    return f"arch=compute_{OLDEST},code=[{','.join(f'sm_{a}' for a in architectures)}]"


def ninja_rules(toolkit: Toolkit, csrc: Path, architectures: tuple[int, ...], pybind11: str) -> list[str]:
    """The variables and rules that `ninja_statements` uses."""
    codes = f"-gencode {codes_for(architectures)}"
    host = [*HOST_FLAGS, f"-I{csrc}", f"-I{pybind11}", f"-I{sysconfig.get_paths()['include']}"]
    host += [f"-DPREFIX_FAST_MODULE={MODULE}"]
    host += [f"-DPREFIX_FAST_CUDA_ARCHITECTURES={'_'.join(map(str, architectures))}"]
    return [
        f"nvcc = {toolkit.nvcc}",
        "rule cuda_kernel",
        f"  command = $nvcc {' '.join(FLAGS)} {codes} -I{csrc / 'cuda'} -DPREFIX_FAST_TYPE=$type -c $in -o $out.part "
        "&& mv $out.part $out",
        "  description = nvcc $in $type",
        "rule cuda_host",
        f"  command = $nvcc {' '.join(host)} -c $in -o $out",
        "rule cuda_link",
        "  command = $nvcc -shared -cudart static -Xlinker --exclude-libs,ALL $in -o $out",
    ]


def ninja_statements(
    toolkit: Toolkit, csrc: Path, architectures: tuple[int, ...], folder: Path, target: Path
) -> list[str]:
    """Statements that make `target`; objects of the host code go to `folder`, those of kernels to the cache."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    headers = sorted(path for ending in ("*.h", "*.cuh") for path in (csrc / "cuda").glob(ending))
    objects, lines = [], []
    for kernel in KERNELS:
        source = csrc / "cuda" / f"{kernel}.cu"
        for kind in TYPES:
            parts = [toolkit.version, " ".join(FLAGS), str(architectures), kind]
            key = hashlib.sha256("\0".join(parts).encode())
            for path in (source, *headers):
                key.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
            built = cache / f"{kernel}-{kind}-{key.hexdigest()[:24]}.o"
            objects.append(built)
            lines += [f"build {_path(built)}: cuda_kernel {_path(source)}", f"  type = {kind}"]
    for name in ("bindings", "device"):
        built = folder / f"{MODULE}_{name}.o"
        objects.append(built)
        needed = " ".join(_path(h) for h in (*headers, csrc / "tensor_info.h"))
        lines.append(f"build {_path(built)}: cuda_host {_path(csrc / 'cuda' / f'{name}.cpp')} | {needed}")
    return [*lines, f"build {_path(target)}: cuda_link {' '.join(_path(o) for o in objects)}"]


def build(architectures: tuple[int, ...], csrc: Path, folder: Path, target: Path) -> None:
    """Compile the extension to `target`, with as many processes as there are processors.

    Raises:
        NotImplementedError: this machine has no nvcc, pybind11 or ninja, or the sources are not here.
        OSError: the compiler failed; its messages went to the terminal.
    """
    toolkit, ninja = find_toolkit(), _ninja()
    try:
        import pybind11
    except ImportError:
        raise NotImplementedError("prefix_fast: expected pybind11 to compile the kernels; pip install it") from None
    if toolkit is None:
        raise NotImplementedError("prefix_fast: expected nvcc on PATH or in CUDA_HOME; install the CUDA toolkit")
    if ninja is None:
        raise NotImplementedError("prefix_fast: expected ninja to compile the kernels; pip install it")
    if not (csrc / "cuda" / "bindings.cpp").exists():
        raise NotImplementedError(
            f"prefix_fast: expected the kernels' sources in {csrc}; install from a checkout, with `pip install -e`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lines = ninja_rules(toolkit, csrc, architectures, pybind11.get_include())
    lines += ninja_statements(toolkit, csrc, architectures, folder, target)
    (folder / "cuda.ninja").write_text("\n".join(lines) + "\n")
    if subprocess.run([ninja, "-f", str(folder / "cuda.ninja"), "-C", str(folder)], check=False).returncode != 0:
        raise OSError("prefix_fast: the CUDA kernels did not compile; nvcc's messages are above")


def install(architectures: str = "") -> Path:
    """Compile the kernels of the checkout that this file is in; returns the extension, beside this file.

    Args:
        architectures: as for `parse_architectures`; empty: those of `wanted_architectures`.

    Raises:
        ValueError: no architecture is named and no card is in the machine.
        NotImplementedError, OSError: as for `build`.
    """
    wanted = parse_architectures(architectures) if architectures else wanted_architectures()
    if not wanted:
        raise ValueError("build-cuda: expected --archs, as in 80,90, as there is no card here to compile for")
    package = Path(__file__).resolve().parent
    target = package / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    build(wanted, package.parent / "csrc", cache_folder() / "host", target)
    return target


def _ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return str(Path(BIN_DIR) / "ninja")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
