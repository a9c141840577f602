"""The `cpu` backend: C++ kernels compiled once per instruction set, one of which is chosen at run time.

PREFIX_FAST_CPU_ISA = generic | avx2 | avx512 | avx512_bf16 forces a level; forcing what cannot run raises with the
reason. The last differs from avx512 on bfloat16 tensors alone: it multiplies pairs of them and sums in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from prefix_fast.backends.problem import Facts, Grads, Problem

NAME = "cpu"
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")  # ascending; the last one that can run is chosen
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_modules: dict[str | None, ModuleType] = {}  # level, or what the environment asked for → extension module


def availability() -> str | None:
    """None where the backend can run; otherwise why not."""
    try:
        extension()
    except (ImportError, NotImplementedError) as error:
        return str(error)
    return None


def device() -> str:
    """Device type of the tensors it takes."""
    return "cpu"


def unsupported_reasons(facts: Facts) -> list[str]:
    """Why a call with these facts cannot run here. Empty: it can."""
    reasons: list[str] = []
    if facts.dtype not in DTYPES:
        reasons.append(f"the cpu backend takes float32, bfloat16 and float16, not {str(facts.dtype)[6:]}")
    if facts.device != "cpu":
        reasons.append(f"the cpu backend takes cpu tensors, not {facts.device}")
    return reasons


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write every element of out and of lse; see `reference` for the formula."""
    extension().forward(problem, out, lse, torch.get_num_threads())


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: Grads
) -> None:
    """Write every element of every gradient that is wanted, and compute no other."""
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    extension().backward(problem, out, lse, grad_out, grad_lse, grads, torch.get_num_threads())


def chosen_isa() -> str:
    """The instruction set that calls run on now.

    Raises:
        NotImplementedError: PREFIX_FAST_CPU_ISA asks for a level that cannot run here.
    """
    forced = os.environ.get("PREFIX_FAST_CPU_ISA") or None
    available = available_isas()
    if forced is None:
        return available[-1]
    if forced not in available:
        raise NotImplementedError(_refusal(forced, available))
    return forced


def available_isas() -> list[str]:
    """The levels that were built and that this CPU and operating system run, ascending."""
    supported = _load("generic").supported_isas()
    return [level for level in LEVELS if level in supported and _is_built(level)]


def description() -> dict[str, str]:
    """What `doctor` prints about this backend."""
    openmp = bool(_load("generic").has_openmp())
    return {
        "instruction set": chosen_isa(),
        "available": ", ".join(available_isas()),
        "threads": str(torch.get_num_threads() if openmp else 1),
        "openmp": "yes" if openmp else "no: one thread",
    }


def extension() -> ModuleType:
    """The extension that serves calls now; the environment is read every time, so that tests can change it."""
    forced = os.environ.get("PREFIX_FAST_CPU_ISA")
    module = _modules.get(forced)
    if module is None:
        module = _modules[forced] = _load(chosen_isa())
    return module


def _load(level: str) -> ModuleType:
    name = f"prefix_fast._native_{level}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be loaded ({error}); build it with `pip install .`") from error


def _is_built(level: str) -> bool:
    return importlib.util.find_spec(f"prefix_fast._native_{level}") is not None


def _refusal(forced: str, available: list[str]) -> str:
    if forced not in LEVELS:
        reason = f"expected one of {', '.join(LEVELS)}"
    elif not _is_built(forced):
        reason = "this installation was built without it"
    else:
        reason = "this CPU or operating system does not support it"
    return f"PREFIX_FAST_CPU_ISA={forced}: {reason}; available here: {', '.join(available)}"
