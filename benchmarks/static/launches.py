"""What a GPU launch would compile: the launches of a call are recorded, with Triton's own specialisation, not executed.

The calls run on meta tensors through the backend's own launch code, so signature, constants, divisibility hints and
options are those of a real launch on an architecture that this machine need not have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import plain_flash
import torch
from sources import source_of
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from prefix_fast.backends import triton as launcher
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.problem import Grads, Problem, SegmentSet
from prefix_fast.backends.triton_config import Device, Tile, Tiles, tiles_for
from prefix_fast.backends.triton_cost import CARDS
from prefix_fast.backends.triton_vetting import Kind, Trial

MULTIPROCESSORS = {card.architecture: card.multiprocessors for card in CARDS.values()}
TARGETS = tuple(MULTIPROCESSORS)


def gpu_target(architecture: str) -> GPUTarget:
    """Triton's name of an architecture."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, specialised for its target as `JITFunction.run` would."""

    kernel: str
    function: Any
    grid: tuple[int, ...]
    target: GPUTarget
    specialisation: str  # launches of one kernel that are equal in it share the compiled code
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    def constant(self, name: str) -> Any:
        """A compile-time argument; None where the kernel has none of that name."""
        names = self.function.arg_names
        return self.constants.get((names.index(name),)) if name in names else None

    def has(self, name: str) -> bool:
        """Whether an argument is there, that is not None, at run time."""
        return self.signature.get(name, "constexpr") != "constexpr"

    @property
    def source(self) -> ASTSource:
        """What Triton compiles."""
        return ASTSource(self.function, self.signature, self.constants, self.attributes)

    @property
    def tile(self) -> Tile:
        """The configuration; 0 for a block that the kernel does not have."""
        blocks = (self.constant(name) or 0 for name in ("BLOCK_Q", "BLOCK_K"))
        return Tile(*blocks, self.options.num_warps, self.options.num_stages)

    @property
    def fingerprint(self) -> str:
        """Of everything that the machine code depends on but the release of Triton: sources, arguments and options."""
        options = (self.target, self.options.num_warps, self.options.num_stages, self.options.enable_fp_fusion)
        arguments = (sorted(self.signature.items()), sorted(self.constants.items()), sorted(self.attributes.items()))
        return hashlib.sha256(f"{source_of(self.function)} {arguments} {options}".encode()).hexdigest()

    def compile(self) -> CompiledKernel:
        """Machine code for the target; from Triton's cache where it has been compiled before."""
        return compile(self.source, target=self.target, options=self.options.__dict__)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program takes; Triton knows them long before there is machine code."""
        backend, context = make_backend(self.target), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
        backend.add_stages(stages, self.options, self.source.language)
        metadata = {"target": self.target, **self.options.__dict__}
        lowering = backend.get_codegen_implementation(self.options), backend.get_module_map()
        module = self.source.make_ir(self.target, self.options, *lowering, context)
        for stage in ("ttir", "ttgir"):
            module = stages[stage](module, metadata)

        def stop(passes: Any, point: str, **_: Any) -> None:
            if point == "ttgpuir-to-llvmir":  # memory has been shared out
                passes.run(module, point)
                raise StopIteration

        with mock.patch(f"{type(backend).__module__}.instrument", stop, create=True), suppress(StopIteration):
            stages["llir"](module, metadata)
        return int(module.get_int_attr("ttg.shared"))


def specialised(function: JITFunction, grid: Any, target: GPUTarget, *args: Any, **kwargs: Any) -> Launch:
    """The launch of one kernel."""
    backend = make_backend(target)
    binder = create_function_from_signature(function.signature, function.params, backend)
    kwargs.setdefault("debug", False)
    bound, specialization, options = binder(*args, **kwargs)
    specialisation = str(specialization) + str(options)
    packed = function._pack_args(backend, kwargs, bound, specialization, options)
    options, signature, constants, attributes = packed
    return Launch(
        function.__name__, function, tuple(grid), target, specialisation, signature, constants, attributes, options
    )


@contextmanager
def recording(architecture: str, choose: Callable[[Device, Kind], Tiles] | None = None) -> Iterator[list[Launch]]:
    """Collect the launches within, as on the architecture; nothing is compiled or run. `choose` replaces the table."""
    launches: list[Launch] = []
    target = gpu_target(architecture)
    device = Device(architecture, MULTIPROCESSORS[architecture])

    def record(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(specialised(function, grid, target, *args, **kwargs))

    def tiles(index: int | None, kind: Kind) -> Tiles:
        return tiles_for(device, *kind) if choose is None else choose(device, kind)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launcher, "device_of", return_value=device),
        mock.patch.object(triton_vetting, "tiles_of_call", tiles),
        mock.patch.object(torch.version, "hip", "any" if target.backend == "hip" else None),
    ):
        yield launches


@dataclass(frozen=True)
class Shape:
    """A call as a model makes it: rows of T tokens that share a prefix of P."""

    H: int
    Hkv: int
    D: int
    B: int = 8
    T: int = 512
    P: int = 512
    N: int = 1
    dtype: torch.dtype = torch.bfloat16
    prefix_dtype: torch.dtype | None = None
    Tk: int | None = None


def problem_of(shape: Shape, **options: Any) -> Problem:
    """The call on meta tensors, laid out as models make them: rows [B, T, H, D] transposed, prefix contiguous."""
    Tk = shape.T if shape.Tk is None else shape.Tk

    def rows(tokens: int, heads: int) -> Tensor:
        return torch.empty(shape.B, tokens, heads, shape.D, dtype=shape.dtype, device="meta").transpose(1, 2)

    def prefix() -> Tensor:
        dtype = shape.prefix_dtype or shape.dtype
        return torch.empty(shape.N, shape.Hkv, shape.P, shape.D, dtype=dtype, device="meta")

    ids = None if shape.N == 1 else torch.empty(shape.B, dtype=torch.int64, device="meta")
    plain = Problem(
        rows(shape.T, shape.H), rows(Tk, shape.Hkv), rows(Tk, shape.Hkv),
        (SegmentSet(prefix(), prefix(), ids, None, None, None, False),),
        None, None, None, None, None, None, True, None, None, None, None, 0.0, None, shape.D**-0.5,
    )  # fmt: skip
    return replace(plain, **options)


def launches_of(
    problem: Problem, architecture: str, choose: Callable[[Device, Kind], Tiles] | None = None
) -> list[Launch]:
    """Forward and backward of a call, every gradient wanted."""
    out = torch.empty_like(problem.query)
    lse = torch.empty(problem.query.shape[:-1], dtype=torch.float32, device="meta")
    sets = tuple((torch.empty_like(s.key), torch.empty_like(s.value)) for s in problem.sets)
    own = (torch.empty_like(t) for t in (problem.query, problem.key, problem.value))
    with recording(architecture, choose) as launches:
        launcher.forward(problem, out, lse)
        launcher.backward(problem, out, lse, torch.empty_like(out), None, Grads(*own, sets))
    return launches


def launches_of_trial(problem: Problem, architecture: str, kernel: str, tile: Tile | None = None) -> list[Launch]:
    """Those of one kernel with a tile, or the table's; whatever the cost model would choose, for all its gradients."""
    out, lse = torch.empty_like(problem.query), torch.empty(problem.query.shape[:-1], device="meta")
    query = None if kernel == "dkv" else torch.empty_like(problem.query)
    own = (torch.empty_like(t) if kernel == "dkv" else None for t in (problem.key, problem.value))
    sets = ((None, None) if kernel == "dq" else (s.key, s.value) for s in problem.sets)
    device = Device(architecture, MULTIPROCESSORS[architecture])
    with recording(architecture) as launches:
        table = tiles_for(device, *launcher.make_call(problem, device, False).kind)
        trial = Trial(kernel, tile or getattr(table, kernel))
        if kernel in ("dq", "dkv", "short"):
            launcher.backward(problem, out, lse, out, None, Grads(query, *own, tuple(sets)), trial)
        else:
            launcher.forward(problem, out, lse, trial)
    function = {"few": "forward_kernel", "split": "split_forward_kernel"}.get(kernel, f"{kernel}_kernel")
    return [launch for launch in launches if launch.kernel == function]


def plain_launch(kernel: str, call: Problem, architecture: str, tile: Tile, precision: str) -> Launch:
    """The plain kernel of that name on queries like those of a call."""
    tensors = [torch.empty_like(call.query) for _ in range(4)]
    with recording(architecture) as launches:
        plain_flash.attention(*tensors, tile, precision)
    return next(launch for launch in launches if launch.kernel == kernel)
