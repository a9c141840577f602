"""The `cuda` backend: the kernels of csrc/cuda, compiled by nvcc at installation or by `prefix-fast build-cuda`.

The extension holds no torch header: it reads a `Problem`'s pointers and strides, and launches on PyTorch's current
stream of the tensors' device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from prefix_fast.backends import cuda_vetting
from prefix_fast.backends.cuda_vetting import MODULE
from prefix_fast.backends.problem import Facts, Grads, Problem, SegmentSet, make_plan
from prefix_fast.backends.triton_vetting import Kind, kind_of

NAME = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
ALIGNMENT = 16  # bytes of a copy from global memory: every row of tokens begins at a multiple
LEAST_CHUNK = 128  # keys that a chunk of a segment is worth
LEAST_TILES = 4  # query tiles that a split of a reader list is worth
BUILD = "`prefix-fast build-cuda` compiles them where nvcc is installed"

_counters: dict[tuple[int, int], Tensor] = {}  # (device, stream) → zeros, which every launch leaves as zeros


def availability() -> str | None:
    """None where the backend can run; otherwise why not."""
    if torch.version.hip is not None:
        return "the cuda backend runs on NVIDIA's cards, and this PyTorch is built for AMD's"
    if not _is_built():
        return f"this installation was built without the CUDA kernels; {BUILD}"
    try:
        module = extension()
    except ImportError as error:
        return f"{MODULE} cannot be loaded ({error}); {BUILD}"
    reason = driver_reason(module.driver_version(), module.runtime_version)
    if reason is not None:
        return reason
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "PyTorch finds no CUDA device on this machine"
    return None


def driver_reason(driver: int, toolkit: int) -> str | None:
    """Why a driver cannot run what a toolkit compiled, both as 1000 · major + 10 · minor; driver 0: there is none.

    Machine code runs on every driver of the toolkit's major version.
    """
    if driver == 0:
        return "this machine has no CUDA driver"
    if driver // 1000 < toolkit // 1000:
        return (
            f"the driver is for CUDA {dotted(driver)}, older than the toolkit {dotted(toolkit)} that compiled "
            "the kernels; update the driver, or compile them with an older toolkit"
        )
    return None


def architecture_reason(capability: tuple[int, int], compiled: tuple[int, ...]) -> str | None:
    """Why a card cannot run kernels compiled for these: it runs those of its major version, up to its own."""
    major, minor = capability
    if any(architecture // 10 == major and architecture % 10 <= minor for architecture in compiled):
        return None
    return (
        f"the kernels are compiled for {', '.join(f'sm_{a}' for a in compiled)}, and the card is sm_{major}{minor}; "
        f"compile them with PREFIX_FAST_CUDA_ARCHS={major}{minor}"
    )


def dotted(version: int) -> str:
    """13.0 of 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device() -> str:
    """Device type of the tensors it takes."""
    return "cuda"


def unsupported_reasons(facts: Facts) -> list[str]:
    """Why a call with these facts cannot run here. Empty: it can."""
    reasons = []
    if facts.dtype not in DTYPES:
        reasons.append(f"the cuda backend takes float32, bfloat16 and float16, not {str(facts.dtype)[6:]}")
    else:
        step = ALIGNMENT // facts.dtype.itemsize
        if facts.head_dim % step or not 0 < facts.head_dim <= MAX_HEAD_DIM:
            kind = str(facts.dtype)[6:]
            reasons.append(
                f"the cuda backend takes head dims that are multiples of {step} up to {MAX_HEAD_DIM} in {kind}, "
                f"not {facts.head_dim}"
            )
    if "many_sets" in facts.uses:
        reasons.append("the cuda backend takes at most 4 segment sets")
    if facts.device != "cuda":
        reasons.append(f"the cuda backend takes cuda tensors, not {facts.device}")
    elif (refused := _device_reason(facts.device_index)) is not None:
        reasons.append(refused)
    return reasons or cuda_vetting.refusals(facts.device_index, kind_of_facts(facts))


def kind_of_facts(facts: Facts) -> Kind:
    """The kind of call, as the self-check knows it."""
    return kind_of(facts.head_dim, facts.dtype, "mixed_prefix" in facts.uses)


def is_preferred(facts: Facts) -> bool:
    """Whether "auto" tries these kernels before Triton's for CUDA tensors: they were found right, and are faster."""
    if facts.dtype not in DTYPES:
        return False
    return cuda_vetting.is_preferred(facts.device_index, kind_of_facts(facts), facts.few_queries)


@functools.cache
def _device_reason(index: int) -> str | None:
    return architecture_reason(torch.cuda.get_device_capability(index), architectures())


def architectures() -> tuple[int, ...]:
    """Those that the kernels are compiled for."""
    return tuple(int(name) for name in extension().architectures.split("_"))


def description() -> dict[str, str]:
    """What `doctor` prints about this backend; nothing where its kernels are not compiled."""
    try:
        extension()
    except ImportError:
        return {}
    return {
        "architectures": ", ".join(f"sm_{a}" for a in architectures()),
        "toolkit": dotted(extension().runtime_version),
        "driver": dotted(extension().driver_version()),
    }


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write every element of out and of lse; see csrc/cuda/forward.cu and decode.cu for the formulas."""
    if out.numel() == 0:
        return
    with torch.cuda.device_of(problem.query):  # a launch goes to the current device
        run_forward(extension(), place_of(problem.query), problem, out, lse)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: Grads
) -> None:
    """Write every element of every gradient that is wanted, and compute no other."""
    with torch.cuda.device_of(problem.query):
        run_backward(extension(), place_of(problem.query), problem, out, lse, grad_out, grad_lse, grads)


@dataclass(frozen=True)
class Place:
    """Where the extension launches a call, and how it allocates."""

    like: Tensor
    index: int  # of the device
    stream: int
    multiprocessors: int
    least_chunk: int = LEAST_CHUNK
    least_tiles: int = LEAST_TILES

    def allocate(self, size: int) -> Tensor:
        """So many bytes, uninitialised."""
        return self.like.new_empty(size, dtype=torch.uint8)

    def counters(self, count: int) -> Tensor:
        """At least so many zeros, of the stream alone, which a launch leaves as zeros."""
        kept = _counters.get((self.index, self.stream))
        if kept is None or kept.numel() < count:
            kept = self.like.new_zeros(max(count, 1024), dtype=torch.int32)
            if not torch.cuda.is_current_stream_capturing():  # memory of a graph belongs to the graph
                _counters[self.index, self.stream] = kept
        return kept


def place_of(tensor: Tensor) -> Place:
    """The tensor's device and PyTorch's current stream there."""
    index = tensor.get_device()
    return Place(tensor, index, torch.cuda.current_stream(index).cuda_stream, _multiprocessors(index))


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def run_forward(module: ModuleType, place: Place, problem: Problem, out: Tensor, lse: Tensor) -> str:
    """Launch the forward pass of the extension; returns the name of the kernel that ran."""
    return str(module.forward(_readable(problem), out, lse, place, uses_tf32(problem)))


def run_backward(
    module: ModuleType, place: Place, problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor,
    grad_lse: Tensor | None, grads: Grads,
) -> None:  # fmt: skip
    """Launch the backward pass of the extension."""
    if grads.are_zeros(out):
        return
    module.backward(
        _readable(problem), aligned(out), lse, aligned(grad_out), grad_lse, _without_empty(grads), place,
        uses_tf32(problem),
    )  # fmt: skip


def uses_tf32(problem: Problem) -> bool:
    """Whether float32 products are of tf32: PyTorch's own setting "medium" asks for it."""
    return problem.query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a dense copy where its rows do not begin at multiples of 16 bytes or have no contiguous dim."""
    size = tensor.element_size()
    strides = (s * size % ALIGNMENT for s, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1)
    if tensor.stride(-1) == 1 and tensor.data_ptr() % ALIGNMENT == 0 and not any(strides):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _readable(problem: Problem) -> Problem:
    """The same call with rows that are `aligned`, and a plan for every set that has ids."""
    rows = [aligned(t) for t in (problem.query, problem.key, problem.value)]
    sets = tuple(_readable_set(s) for s in problem.sets)
    same = all(a is b for a, b in zip(rows, (problem.query, problem.key, problem.value), strict=True))
    if same and all(a is b for a, b in zip(sets, problem.sets, strict=True)):
        return problem
    return replace(problem, query=rows[0], key=rows[1], value=rows[2], sets=sets)


def _readable_set(given: SegmentSet) -> SegmentSet:
    key, value = aligned(given.key), aligned(given.value)
    plan = given.plan
    if given.ids is not None and plan is None:
        plan = make_plan(given.ids, given.count)
    same = key is given.key and value is given.value and plan is given.plan
    return given if same else replace(given, key=key, value=value, plan=plan)


def _without_empty(grads: Grads) -> Grads:
    """The wanted gradients that have elements."""

    def kept(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None or tensor.numel() == 0 else tensor

    sets = tuple((kept(key), kept(value)) for key, value in grads.sets)
    return Grads(kept(grads.query), kept(grads.key), kept(grads.value), sets)


@functools.cache
def _is_built() -> bool:
    return importlib.util.find_spec(MODULE) is not None


@functools.cache
def extension() -> ModuleType:
    """The compiled kernels."""
    return importlib.import_module(MODULE)
