"""Products with a frozen weight, through the library that is fastest on this machine.

    y = x · Wᵀ + b,    dx = dy · W        x [..., K], W [N, K]; no dW: W does not change

PyTorch multiplies float32 through MKL, which leaves much of some CPUs unused. oneDNN, which PyTorch brings too, takes
the weight where it lies: no second copy is made. What is faster depends on the CPU, the dtype, whether W lies by rows
or by columns (dy · W is a product with Wᵀ, which lies the other way) and the number of rows of x. Each of these is
timed once, by `patch` or `prefix-fast doctor`, and the times are kept on disk: a call looks the winner up and times
nothing, so that runs repeat bit for bit.

PREFIX_FAST_LINEARS: `0` leaves all products to PyTorch's own choice, `onednn` gives all to oneDNN, untimed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_fast.backends.triton_vetting import cache_folder
from prefix_fast.files import replace_files

VARIABLE = "PREFIX_FAST_LINEARS"
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # between the libraries, of the largest value
LAYOUTS = ("rows", "columns")
ROWS = {"one": 1, "few": 16, "many": 512}  # rows of x in the measurement of each class
FEW = 48  # rows of x below which the weight's way from memory counts most
WEIGHT = (768, 768)
WEIGHTS = 6  # in turns, so that few rows find them in no nearer cache than a model's layers do
LEAST_GAIN = 0.05  # share of PyTorch's time that oneDNN must save
CALL = 25e-6  # seconds that a product called from Python takes longer than PyTorch's own
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.3, 3, 30  # of one measurement
_FORMAT = 1  # of the files, and of what is timed

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Product(NamedTuple):
    """What a decision is about: a product x · Wᵀ with W of a dtype and layout and a class of rows of x."""

    dtype: torch.dtype
    layout: str
    rows: str

    @classmethod
    def of(cls, x: Tensor, transposed: bool) -> Product:
        """The product of x with a contiguous weight, or with its transpose."""
        count = x.numel() // x.shape[-1]
        rows = "one" if count == 1 else "few" if count < FEW else "many"
        return cls(x.dtype, "columns" if transposed else "rows", rows)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.layout}-{self.rows}"


class Times(NamedTuple):
    """Seconds of one product with PyTorch's own choice and with oneDNN; infinite where its numbers are not the same."""

    torch: float
    onednn: float

    @property
    def fastest(self) -> str:
        """The library to use."""
        return "onednn" if self.onednn + CALL < (1 - LEAST_GAIN) * self.torch else "torch"


class Environment(NamedTuple):
    """What times hold for."""

    processor: str
    capability: str
    torch: str
    format: int = _FORMAT


_times: dict[Product, Times | None] = {}  # None: none on disk


def products_of(dtypes: Iterable[torch.dtype] = DTYPES) -> list[Product]:
    """Every product that can be asked for in these dtypes."""
    return [Product(dtype, layout, rows) for dtype in dtypes for layout in LAYOUTS for rows in ROWS]


def choice() -> str:
    """What the environment variable says; empty: the faster library."""
    return os.environ.get(VARIABLE, "")


def library_of(product: Product) -> str:
    """`torch` or `onednn`."""
    chosen = choice()
    if chosen == "0" or torch.are_deterministic_algorithms_enabled():
        return "torch"
    if chosen == "onednn":
        return chosen
    times = times_of(product)
    return "torch" if times is None else times.fastest


def times_of(product: Product) -> Times | None:
    """From memory or disk; None: the product was not timed."""
    if product not in _times:
        _times[product] = _read(product)
    return _times[product]


def decide(products: Iterable[Product], renew: bool = False) -> None:
    """Time those without times on disk, or all of them, and keep what was found.

    Nothing is timed under `torch.use_deterministic_algorithms`. Where the cache folder cannot be written nothing is
    kept, and PyTorch's own choice stays: another run would find other times.
    """
    if choice() in ("0", "onednn") or torch.are_deterministic_algorithms_enabled():
        return
    for product in products:
        if renew or times_of(product) is None:
            try:
                _times[product] = _keep(product, measure(product), renew)
            except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
                _times[product] = None


def frozen_linear(x: Any, weight: Any, bias: Any, transposed: bool = False) -> Tensor | None:
    """y = x · Wᵀ + b, with `transposed` x · W + b, and a gradient for x alone.

    None where PyTorch's own path is to be taken: it is as fast, or the call is not one of frozen CPU tensors.
    """
    if not _can_apply(x, weight, bias, transposed):
        return None
    with_gradient = torch.is_grad_enabled() and x.requires_grad
    there = library_of(Product.of(x, transposed))
    back = library_of(Product.of(x, not transposed)) if with_gradient else "torch"
    if there == back == "torch":
        return None
    return _FrozenLinear.apply(x, weight, bias, transposed) if with_gradient else _product(x, weight, bias, transposed)


def _can_apply(x: Any, weight: Any, bias: Any, transposed: bool) -> bool:
    """Whether this is the product of a plain CPU tensor and frozen ones, which autocast leaves as they are."""
    if not are_plain(x) or not is_frozen(weight, x) or not (bias is None or is_frozen(bias, x)):
        return False
    if x.dim() < 2 or x.shape[-1] != weight.shape[0 if transposed else 1]:
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype
    return not cast and torch._C._get_mkldnn_enabled()


def are_plain(*tensors: Any) -> bool:
    """Whether these are plain, non-empty CPU tensors of our dtypes, and nobody watches PyTorch's operators."""
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in DTYPES or tensor.numel() == 0:
            return False
    return not (
        torch._C._len_torch_dispatch_stack() > 0  # a mode counts, fakes or records PyTorch's own operators
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def is_watched(module: torch.nn.Module) -> bool:
    """Whether a module has hooks or a forward of its own, so that it has to be called as it is."""
    return "forward" in module.__dict__ or any(module.__dict__.get(hooks) for hooks in HOOKS)


def is_frozen(parameter: Any, x: Tensor) -> bool:
    """Whether a weight or bias is a plain contiguous CPU tensor of x's dtype that takes no gradient."""
    return (
        type(parameter) in (Tensor, torch.nn.Parameter)
        and not parameter.requires_grad
        and parameter.dtype == x.dtype
        and parameter.is_cpu
        and parameter.is_contiguous()
    )


class _FrozenLinear(torch.autograd.Function):
    """The weight is no saved tensor: a checkpointed layer that ends with a product need not repeat that one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.weight, ctx.version, ctx.transposed = weight, weight._version, transposed
        return _product(x, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        weight = ctx.weight
        if weight._version != ctx.version:
            raise RuntimeError(
                "prefix_fast: expected a frozen weight that stays as it is between forward and backward, got one of"
                f" shape {tuple(weight.shape)} that was modified in place; write to it after the backward pass"
            )
        if torch.is_grad_enabled() and dy.requires_grad:
            return _FrozenLinear.apply(dy, weight, None, not ctx.transposed), None, None, None
        return _product(dy, weight, None, not ctx.transposed), None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    matrix = weight.t() if transposed else weight
    if library_of(Product.of(x, transposed)) == "torch":
        return F.linear(x, matrix, bias)
    return _onednn(x, matrix, bias)


def _onednn(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


def measure(product: Product) -> Times:
    """Time a product with both libraries, in turns; the least of the rounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS[product.rows], WEIGHT[1], generator=generator).to(product.dtype)
    matrices = [torch.randn(WEIGHT, generator=generator).to(product.dtype) for _ in range(WEIGHTS)]
    if product.layout == "columns":
        matrices = [matrix.t() for matrix in matrices]  # square
    with torch.no_grad():
        expected = F.linear(x, matrices[0])
        try:
            error = (_onednn(x, matrices[0]) - expected).abs().max() / expected.abs().max()
        except (RuntimeError, AttributeError):  # a build without oneDNN or without the operator
            error = torch.tensor(torch.inf)
        if not error <= TOLERANCE[product.dtype]:
            return Times(_least_seconds(x, matrices, F.linear)[0], torch.inf)
        theirs, ours = _least_seconds(x, matrices, F.linear, _onednn)
        return Times(theirs, ours)


def _least_seconds(x: Tensor, matrices: list[Tensor], *calls: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    least = [torch.inf for _ in calls]
    started = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for index, call in enumerate(calls):
            begun = time.perf_counter()
            call(x, matrices[done % len(matrices)])
            least[index] = min(least[index], time.perf_counter() - begun)
    return least


@functools.cache
def environment() -> Environment:
    """What times of this process hold for."""
    return Environment(processor(), torch.backends.cpu.get_cpu_capability(), str(torch.__version__))


@functools.cache
def processor() -> str:
    """The processor's name, with the numbers that tell apart what a virtual machine gives one name."""
    cpuinfo = Path("/proc/cpuinfo")
    facts = {}
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = ", ".join(f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts)
    return f"{facts['model name']} ({numbers})" if numbers else facts["model name"]


def _file(product: Product) -> Path:
    folder = hashlib.sha256(json.dumps(environment()).encode()).hexdigest()[:16]
    return cache_folder() / "linears" / folder / f"{product}.json"


def _entry(product: Product, times: Times) -> dict[str, Any]:
    return {"environment": environment()._asdict(), "product": str(product), "seconds": times._asdict()}


def _read(product: Product) -> Times | None:
    """The times on disk; None where there are none, or the file is damaged or about something else."""
    try:
        entry = json.loads(_file(product).read_bytes())
        times = Times(**{name: float(seconds) for name, seconds in entry["seconds"].items()})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # RuntimeError: no home folder
        return None
    return times if min(times) > 0 and entry == _entry(product, times) else None


def _keep(product: Product, times: Times, renew: bool) -> Times:
    """Write the times; without `renew` the first of several processes wins, and all of them use what it wrote."""
    file, content = _file(product), json.dumps(_entry(product, times)).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    if not renew:
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_bytes(content)
            os.link(temporary, file)  # fails where the file is there
            return times
        except OSError:
            if (earlier := _read(product)) is not None:
                return earlier
        finally:
            temporary.unlink(missing_ok=True)
    replace_files(file.parent, {file.name: content})
    return times
