"""What runs here: every available backend is checked against the float64 oracle on this machine's devices.

On a GPU each configuration of the Triton kernels is checked before, so that the backend then runs as users will see it.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from prefix_fast import dispatch, half, linears, selfcheck, testing, tuning
from prefix_fast.backends import cuda, cuda_vetting, native, triton, triton_vetting
from prefix_fast.backends.cuda_vetting import Times
from prefix_fast.backends.problem import Facts
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_vetting import Configuration, Kind, Verdict
from prefix_fast.testing import Case

CASES = (
    Case(B=2, H=4, Hkv=4, Tq=17, Tk=17, P=9, D=64),
    Case(B=3, H=6, Hkv=2, Tq=33, Tk=40, N=3, P=17, D=64, ids="random", lengths="random", key_mask="left"),
    Case(B=4, H=4, Hkv=2, Tq=1, Tk=19, P=65, D=32, key_mask="right"),
    Case(B=2, H=2, Hkv=1, Tq=5, Tk=0, P=7, D=128, is_causal=False),
    Case(B=3, H=4, Hkv=4, Tq=12, Tk=12, N=2, P=6, D=64, num_sets=2, ids="random", packed=True),
    Case(B=2, H=4, Hkv=4, Tq=16, Tk=16, P=8, D=64, dropout_p=0.2),
    Case(B=3, H=4, Hkv=2, Tq=24, Tk=40, P=20, D=64, options={"window": 12, "softcap": 5.0, "sinks": True}),
    Case(B=3, H=4, Hkv=2, Tq=1, Tk=9, N=2, P=40, D=64, ids="random", options={"window": 25, "in_window": True}),
    Case(B=2, H=4, Hkv=4, Tq=12, Tk=12, P=18, D=64, attn_bias=True, options={"segment_bias": True}),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CheckResult(NamedTuple):
    """One backend on one device: how many cases it passed, does not serve, and what went wrong in the others."""

    backend: str
    device: str
    passed: int
    unsupported: int
    failures: tuple[str, ...]


class CudaState(NamedTuple):
    """The CUDA kernels on one device."""

    device: str
    verdicts: dict[str, str | None]  # by kind of call: "" right, else what was wrong; None: unchecked
    times: dict[str, Times]  # of Triton's kernels and of CUDA's, by kind of work


class ConfigurationState(NamedTuple):
    """One configuration of the Triton kernels on one device: the tile that calls use, and what is known of it."""

    device: str
    configuration: str
    tile: Tile | None  # None: the kernel is refused
    state: str
    failure: str | None  # of the table's tile


def configurations_reason() -> str | None:
    """Why no configuration of the Triton kernels is checked here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device here"
    return triton.availability()


def check_configurations(
    every: bool = False,
    recheck: bool = False,
    tune: bool = False,
    progress: Callable[[Configuration], None] | None = None,
) -> list[ConfigurationState]:
    """Check configurations on each device; those with a verdict on record again only if asked to.

    Args:
        every: all of them, not only those that most models need.
        recheck: those with a verdict too; what tuning found is forgotten with it.
        tune: time other tiles of those that were not tuned yet, and keep the fastest that passes.
        progress: called with each configuration before its check.
    """
    wanted = selfcheck.configurations(selfcheck.all_kinds() if every else selfcheck.usual_kinds())
    states = []
    checked: set[triton_vetting.Environment] = set()
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        if reasons := triton_vetting.device_refusals(index):
            states.append(ConfigurationState(name, "all", None, f"refused: {reasons[0]}", None))
            continue
        environment = triton_vetting.environment_of(index)
        found = selfcheck.run(name, wanted, renew=recheck and environment not in checked, progress=progress)
        checked.add(environment)  # cards of one kind share their verdicts
        if tune:
            found = tuning.tune(name, wanted, progress=progress)
        states += [_state(name, index, configuration, found.get(configuration)) for configuration in wanted]
    return states


def _state(device: str, index: int, configuration: Configuration, verdict: Verdict | None) -> ConfigurationState:
    if verdict is None:
        _, safe = triton_vetting.candidates(index, configuration)
        return ConfigurationState(device, str(configuration), safe, "unchecked: safe tile used", None)
    if verdict.refused:
        return ConfigurationState(device, str(configuration), None, "failed with every tile: refused", verdict.failure)
    if verdict.used != verdict.checked:
        state = "checked, tuned" if verdict.failure is None else "failed: tuned tile used"
    else:
        state = "checked" if verdict.failure is None else "failed: safe tile used"
    return ConfigurationState(device, str(configuration), verdict.used, state, verdict.failure)


def check_cuda_kernels(
    every: bool = False, recheck: bool = False, tune: bool = False, progress: Callable[[Kind], None] | None = None
) -> list[CudaState]:
    """Check the CUDA kernels on each device, for kinds without a verdict unless asked to; `tune` times them too."""
    kinds = selfcheck.all_kinds() if every else selfcheck.usual_kinds()
    states = []
    for index in range(torch.cuda.device_count()):
        found = {}
        for kind in kinds:
            if progress is not None:
                progress(kind)
            uses = ("mixed_prefix",) if kind.mixed else ()
            facts = Facts("cuda", kind.dtype, kind.block_d, uses, index)
            found[str(kind)] = selfcheck.run_cuda(torch.device("cuda", index), facts, renew=recheck)
        if tune:
            tuning.time_backends(f"cuda:{index}")
        times = {work: cuda_vetting.times_of(index, work) for work in cuda_vetting.WORKS}
        states.append(CudaState(f"cuda:{index}", found, times))
    return states


def check_linears(recheck: bool = False) -> dict[linears.Product, linears.Times | None]:
    """Times of the products with frozen weights on this CPU; those on record are taken again only if asked to.

    None: nothing could be timed or kept.
    """
    products = linears.products_of()
    linears.decide(products, renew=recheck)
    return {product: linears.times_of(product) for product in products}


def check_backends() -> list[CheckResult]:
    """Check every available backend, output and gradients, on each device that it takes and this machine has."""
    return [
        _check(info.name, device)
        for info in dispatch.backends()
        if info.available
        for device in _devices()
        if info.device in ("any", device)
    ]


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for case in CASES:
            yield replace(case, dtype=dtype)


def _check(backend: str, device: str) -> CheckResult:
    passed, unsupported, failures = 0, 0, []
    for case in _cases():
        problem = testing.make_problem(case, device)
        if dispatch.unsupported_reasons(backend, dispatch.facts_of(problem)):
            unsupported += 1
            continue
        try:
            testing.check(problem, backend)
            passed += 1
        except Exception as error:  # whatever a backend does wrong on this machine is what the doctor reports
            failures.append(f"{case}: {type(error).__name__}: {error}")
    return CheckResult(backend, device, passed, unsupported, tuple(failures))


def environment() -> dict[str, str]:
    """Processor, devices, versions and the settings that steer the library."""
    facts = {
        "processor": f"{linears.processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
    }
    reason = half.lacking(torch.device("cpu"), torch.bfloat16)
    facts["compute_dtype=bfloat16"] = reason or "native; copies of frozen linear weights, half of float32's bytes"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    if native.availability() is None:
        facts |= {f"cpu {name}": value for name, value in native.description().items()}
    facts |= {f"cuda {name}": value for name, value in cuda.description().items()}
    facts["python"] = platform.python_version()
    for package in ("prefix-fast", "torch", "transformers", "peft", "triton"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("PREFIX_FAST_")}
    return facts
