"""What `make test-sanitize` relies on: a fault in a copy of the C++ kernels is found, the copy alone is clean."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

pytestmark = pytest.mark.slow

CXX = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fopenmp", "-Wno-psabi", "-Wno-unknown-pragmas")
MODULE = "_native_generic"
MEMORY = ("address,undefined", ("libasan.so", "libubsan.so"), {"ASAN_OPTIONS": "detect_leaks=0"})
THREAD = ("thread", ("libtsan.so",), {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"})


def runtime(name: str) -> str:
    """Path of a sanitizer's library."""
    if shutil.which(CXX) is None:
        pytest.skip(f"needs {CXX}")
    found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():  # the bare name: there is none
        pytest.skip(f"{CXX} has no {name}")
    return found


def run_sanitized(kind, root: Path, folder: Path, test: str, change: tuple[str, str, str] | None) -> str:
    """What pytest and the sanitizer say of a test on kernels whose source has a change (file, old, new)."""
    sanitizer, runtimes, settings = kind
    libraries = [runtime(name) for name in runtimes]
    shutil.copytree(root / "csrc", folder / "csrc")
    if change is not None:
        file, old, new = change
        source = (folder / "csrc" / file).read_text()
        assert source.count(old) == 1, f"{file} has changed: change this test with it"
        (folder / "csrc" / file).write_text(source.replace(old, new))
    made = folder / "prefix_fast" / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    made.parent.mkdir()
    includes = (folder / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"])
    sources = (folder / "csrc" / "bindings.cpp", *sorted((folder / "csrc" / "cpu").glob("*.cpp")))
    subprocess.run(
        [CXX, *FLAGS, f"-fsanitize={sanitizer}", f"-DPREFIX_FAST_MODULE={MODULE}", *(f"-I{path}" for path in includes),
         "-shared", *sources, "-o", made],
        check=True, timeout=1200,
    )  # fmt: skip
    kernels = {"PREFIX_FAST_NATIVE_FOLDER": str(made.parent), "PREFIX_FAST_CPU_ISA": "generic"}
    environment = os.environ | settings | kernels | {"LD_PRELOAD": " ".join(libraries)}
    options = ("-q", "-k", "generic", "--capture=sys")  # a sanitizer reports to the file descriptor
    absent = ("-p", "no:benchmark", "-p", "no:faulthandler", "-p", "no:cacheprovider")
    command = [sys.executable, "-I", "-m", "pytest", *options, *absent, root / "tests" / test]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    return f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}"


THREADS = "test_native_bits.py::test_bits_do_not_depend_on_threads"
STRIDES = "test_native_memory.py::test_strides_change_no_bits"
SHARED_SCRATCH = ("cpu/parallel.h", "static thread_local Scratch buffers", "static Scratch buffers")
ONE_TOO_MANY = ("cpu/half.h", "for (; c < count; ++c) to[c] = factor", "for (; c <= count; ++c) to[c] = factor")
OVERFLOW = ("cpu/simd.h", "return x - VecI{};", "return x * x * x * x - VecI{};")


@pytest.mark.parametrize(
    ("kind", "test", "change", "report"),
    [
        (THREAD, THREADS, None, None),
        (THREAD, THREADS, SHARED_SCRATCH, "ThreadSanitizer: data race"),
        (MEMORY, STRIDES, ONE_TOO_MANY, "AddressSanitizer: heap-buffer-overflow"),
        (MEMORY, "test_native_dropout.py", OVERFLOW, "signed integer overflow"),
    ],
    ids=["clean", "shared scratch", "one number too many", "overflow"],
)
def test_faults_are_found(kind, test, change, report, root, tmp_path):
    said = run_sanitized(kind, root, tmp_path, test, change)
    if report is None:
        assert " passed" in said
        assert said.endswith("exit status 0"), said
        assert "Sanitizer" not in said
    else:
        assert report in said, said
        assert not said.endswith("exit status 0")
