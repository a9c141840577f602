"""What pyproject.toml cannot say: the C++ extensions (one per instruction set), the CUDA one, the Triton folder."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = ("forward", "backward", "cross_entropy", "pointwise", "peak")
SOURCES = ("csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in KERNELS))

# -march=native is never used: a wheel runs on machines other than the one that built it. F16C comes with every AVX2.
X86_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
X86_FLAGS["avx512_bf16"] = (*X86_FLAGS["avx512"], "-mavx512bf16")
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Compiler flags of every level that this machine's architecture has."""
    levels: dict[str, tuple[str, ...]] = {"generic": ()}
    if platform.machine().lower() in ("x86_64", "amd64"):
        levels.update(X86_FLAGS)
    return levels


def compiler() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def openmp_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(compile, link) flags for OpenMP; empty, with a warning, where the compiler has none."""
    candidates = [(("-fopenmp",), ("-fopenmp",))]
    if sys.platform == "darwin":
        candidates.append((("-Xpreprocessor", "-fopenmp"), ("-lomp",)))
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(program)
        for compile_flags, link_flags in candidates:
            command = [compiler(), *compile_flags, str(source), "-o", str(Path(folder) / "probe"), *link_flags]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return compile_flags, link_flags
    warnings.warn(f"{compiler()} has no OpenMP: the cpu backend will use one thread")
    return (), ()


def load_cuda_build() -> ModuleType:
    """prefix_fast/cuda_build.py, without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "prefix_fast" / "cuda_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_build = load_cuda_build()
CUDA_EXTENSION = f"prefix_fast.{cuda_build.MODULE}"


def cuda_extensions() -> list[Extension]:
    """The CUDA extension where nvcc is found and architectures are asked for, or a card is in this machine.

    Its kernels take minutes to compile, so a machine without a card does not build them unasked.
    """
    architectures = cuda_build.wanted_architectures()
    if architectures and cuda_build.find_toolkit() is None:
        if os.environ.get(cuda_build.VARIABLE):
            warnings.warn(f"{cuda_build.VARIABLE} is set but there is no nvcc: installing without the CUDA kernels")
        return []
    return [Extension(CUDA_EXTENSION, [])] if architectures else []


class NinjaBuild(build_ext):
    """Compiles all sources of all instruction sets, and the CUDA kernels, in one parallel ninja run."""

    def build_extensions(self) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        compile_flags, link_flags = openmp_flags()
        shared = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
        includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        extra_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        lines = [
            f"cxx = {escape(compiler())}",
            f"cflags = {' '.join(escape(f) for f in (*COMMON_FLAGS, *compile_flags, *includes, *extra_flags))}",
            f"ldflags = {' '.join((*shared, *link_flags))} {os.environ.get('LDFLAGS', '')}".rstrip(),
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $cflags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $in $ldflags -o $out",
        ]
        for extension in self.extensions:
            if extension.name == CUDA_EXTENSION:
                lines += self.cuda_statements(extension, folder)
            else:
                lines += self.statements(extension, folder)
        build_file = folder / "build.ninja"
        build_file.write_text("\n".join(lines) + "\n")
        subprocess.run([ninja(), "-f", str(build_file), "-C", str(folder)], check=True)

    def statements(self, extension: Extension, folder: Path) -> list[str]:
        """The objects of one instruction set and the module that they make."""
        module = extension.name.rpartition(".")[2]
        flags = " ".join([*extension.extra_compile_args, f"-DPREFIX_FAST_MODULE={module}"])
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects, lines = [], []
        for source in extension.sources:
            built = folder / module / Path(source).with_suffix(".o").name
            objects.append(escape_path(built))
            lines += [f"build {escape_path(built)}: compile {escape_path(ROOT / source)}", f"  isa = {flags}"]
        return [*lines, f"build {escape_path(target)}: link {' '.join(objects)}"]

    def cuda_statements(self, extension: Extension, folder: Path) -> list[str]:
        """Rules and statements of the CUDA extension."""
        toolkit, architectures = cuda_build.find_toolkit(), cuda_build.wanted_architectures()
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        csrc = ROOT / "csrc"
        rules = cuda_build.ninja_rules(toolkit, csrc, architectures, pybind11.get_include())
        return [*rules, *cuda_build.ninja_statements(toolkit, csrc, architectures, folder, target)]


def escape(argument: str) -> str:
    """A command-line argument inside a ninja variable."""
    quoted = f"'{argument}'" if " " in argument else argument
    return quoted.replace("$", "$$")


def escape_path(path: Path) -> str:
    """A path in a ninja build statement."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja() -> str:
    """The ninja of the build environment, or the system's."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR) / "ninja")


setup(
    packages=[
        "prefix_fast",
        "prefix_fast.backends",
        "prefix_fast.kernels",
        "prefix_fast.models",
        "prefix_fast.training",
    ],
    package_dir={"prefix_fast.kernels": "kernels"},
    package_data={"prefix_fast": ["py.typed"]},
    ext_modules=[
        Extension(f"prefix_fast._native_{level}", [str(s) for s in SOURCES], extra_compile_args=list(flags))
        for level, flags in instruction_sets().items()
    ]
    + cuda_extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
