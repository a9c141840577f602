"""The self-check of the GPU kernels: each configuration against the oracle on the device that is to run it.

One kernel at a time runs on small calls with several tiles each way and ragged ends, through the launchers that every
call uses, into outputs full of NaN; its results must be within the error budget of `prefix_fast.testing`. `patch`
checks what its model needs, `prefix-fast doctor` everything; `backends.triton_vetting` keeps what was found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefix_fast import dispatch, testing
from prefix_fast.backends import cuda, cuda_vetting, triton, triton_vetting
from prefix_fast.backends.problem import Facts, Grads, Problem
from prefix_fast.backends.triton import NAME
from prefix_fast.backends.triton_config import PRECISIONS, Tile
from prefix_fast.backends.triton_vetting import Configuration, Kind, Trial, Verdict
from prefix_fast.testing import Case

BLOCKS = (16, 32, 64, 128, 256)  # padded head dims
HALVES = (torch.bfloat16, torch.float16)
TRANSIENT = (torch.OutOfMemoryError, OSError)  # say nothing about a kernel
_BIAS = {"segment_bias": True}  # beside that of the own tokens
_vetted: set[tuple[Any, ...]] = set()  # what this process has looked into for a model


def all_kinds() -> list[Kind]:
    """Every kind of call that the kernels serve."""
    of_halves = [(dtype, "ieee", mixed) for dtype in HALVES for mixed in (False, True)]
    of_singles = [(torch.float32, precision, False) for precision in PRECISIONS.values()]
    kinds = [Kind(block_d, *rest) for block_d in BLOCKS for rest in (*of_halves, *of_singles)]
    return [kind for kind in kinds if kind.block_d <= 128 or kind.precision == "ieee"]


def usual_kinds() -> list[Kind]:
    """Those of most models: head dims 64 and 128, and of float32 products the precision that is set now."""
    present = PRECISIONS[torch.get_float32_matmul_precision()]
    return [
        kind
        for kind in all_kinds()
        if kind.block_d in (64, 128) and kind.precision == (present if kind.dtype == torch.float32 else "ieee")
    ]


def configurations(kinds: Iterable[Kind]) -> list[Configuration]:
    """Every kernel for each of the kinds."""
    return [Configuration(kernel, kind) for kind in kinds for kernel in _CHECKED]


def run(
    device: torch.device | str,
    wanted: Iterable[Configuration],
    *,
    renew: bool = False,
    progress: Callable[[Configuration], None] | None = None,
) -> dict[Configuration, Verdict]:
    """Check the configurations that have no verdict yet on the device, and record what is found.

    Args:
        device: of CUDA or ROCm, or "cpu" where Triton's interpreter runs the kernels.
        wanted: the configurations, as from `configurations`.
        renew: check those with a verdict again.
        progress: called with each configuration before its check.

    Returns:
        The verdicts. A configuration is missing where memory or disk ran out: it stays unchecked, with its safe tile.

    Raises:
        RuntimeError: a call is being traced or captured, or a kernel left the device unusable; that is recorded too.
    """
    device = torch.device(device)
    index = index_of(device)
    if busy(device):
        raise RuntimeError("selfcheck.run: expected no call that is being traced or captured; run it before")
    verdicts = {}
    for configuration in wanted:
        verdict = None if renew else triton_vetting.verdict_of(index, configuration)
        if verdict is None:
            if progress is not None:
                progress(configuration)
            verdict = _check(device, index, configuration)
        if verdict is not None:
            verdicts[configuration] = verdict
    return verdicts


def vet(device: torch.device, backend: str, head_dim: int, dtype: torch.dtype, prefix_dtype: torch.dtype) -> None:
    """Check what a model's calls on this device need, where Triton serves them; what has a verdict costs a look.

    Under autocast all inputs of a call have its dtype. While a call is being traced or captured nothing happens.
    """
    if device.type != "cuda":
        return
    if torch.is_autocast_enabled(device.type):
        dtype = prefix_dtype = torch.get_autocast_dtype(device.type)
    key = (device, backend, head_dim, dtype, prefix_dtype, torch.get_float32_matmul_precision())
    if key in _vetted or busy(device):
        return
    _vetted.add(key)
    index = index_of(device)
    mixed = dtype in HALVES and prefix_dtype == torch.float32
    facts = Facts(device.type, dtype, head_dim, ("mixed_prefix",) if mixed else (), index or 0)
    if backend in ("auto", cuda.NAME):
        run_cuda(device, facts)
    if _chosen(backend, facts) != NAME:
        return
    kind = triton_vetting.kind_of(head_dim, dtype, mixed)
    unchecked = [wanted for wanted in configurations([kind]) if triton_vetting.verdict_of(index, wanted) is None]
    if unchecked:
        card = triton_vetting.environment_of(index).card
        logging.getLogger(__name__).warning("Checking the Triton kernels for %s on %s, once for this card", kind, card)
        run(device, unchecked)


def run_cuda(device: torch.device, facts: Facts, *, renew: bool = False) -> str | None:
    """Check the CUDA kernels, where they can run on the device, for a kind of call without a verdict; record it.

    Returns:
        What is known then: "" where they are right; None where they cannot run, or memory or disk ran out.
    """
    if cuda.availability() is not None:
        return None
    index, kind = facts.device_index, cuda.kind_of_facts(facts)
    verdict = cuda_vetting.verdict_of(index, kind)
    if not renew and (verdict is not None or cuda.unsupported_reasons(facts)):
        return verdict
    cuda_vetting.forget_verdict(index, kind)
    try:
        cuda_vetting.record_verdict(index, kind, alone(_failure_of_cuda, device, kind))
    except TRANSIENT:
        return None
    raise_fault(device, f"CUDA kernels for {kind}")
    return cuda_vetting.verdict_of(index, kind)


def _failure_of_cuda(device: torch.device, kind: Kind) -> str | None:
    """Why the CUDA kernels are wrong, or None: forward and backward of all that they have kernels for."""
    tile = Tile(64, 64, 4, 1)
    every = (
        case for cases in (_cases_by_row, _cases_of_few_queries, _cases_of_short) for case in cases(tile, kind.block_d)
    )
    with defaults(device, kind):
        for case in every:
            try:
                testing.check(make_problem(case, kind, device), cuda.NAME)
            except TRANSIENT:
                raise
            except Exception as error:  # whatever a card does wrong is what the check is there to find
                return f"{type(error).__name__} on {case}: {error}"
    return None


def vet_model(
    model: torch.nn.Module, backend: str, head_dim: int, compute_dtype: torch.dtype | None, with_masters: bool
) -> None:
    """`vet` for every device that holds a part of the model; `with_masters`: its prefix is float32 in any case."""
    dtype = compute_dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    prefix_dtype = torch.float32 if with_masters and compute_dtype is None else dtype
    for device in sorted({parameter.device for parameter in model.parameters()}, key=str):
        vet(device, backend, head_dim, dtype, prefix_dtype)


def busy(device: torch.device) -> bool:
    """Whether a check must not run now: a call is being traced or captured, or its operations go elsewhere."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or captured


def index_of(device: torch.device) -> int | None:
    """Of a CUDA or ROCm device; None: the interpreter."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _chosen(backend: str, facts: Facts) -> str | None:
    try:
        return dispatch.choose(backend, *facts)
    except NotImplementedError:
        return None  # the call itself will say why


def _check(device: torch.device, index: int | None, configuration: Configuration) -> Verdict | None:
    """Check the table's tile and, where it fails, the safe one; None: memory or disk ran out."""
    tiles = triton_vetting.candidates(index, configuration)
    failures: list[str | None] = []
    try:
        for tile in dict.fromkeys(tiles):
            failures.append(failure(device, configuration, tile))
            if failures[-1] is None or fault_of(device) is not None:
                break
    except TRANSIENT:
        return None
    verdict = triton_vetting.record(index, configuration, failures[0], failures[1] if len(failures) > 1 else None)
    if failures[-1] is not None:
        raise_fault(device, f"kernel {configuration}")
    return verdict


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a thread of its own: no autocast, grad mode, hook or mode of the caller is there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def failure(device: torch.device, configuration: Configuration, tile: Tile) -> str | None:
    """Why the tile is wrong, or None. Raises one of TRANSIENT where memory or disk ran out."""
    return alone(_failure, device, configuration, tile)


def raise_fault(device: torch.device, what: str) -> None:
    """RuntimeError where a kernel has left the device unusable."""
    fault = fault_of(device)
    if fault is not None:
        raise RuntimeError(
            f"selfcheck.run: expected the {what} to leave the device usable, got {fault}; that is recorded: start this "
            "process again, which will not run it"
        ) from fault


def fault_of(device: torch.device) -> RuntimeError | None:
    """What makes every further call on the device fail, after an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return error
    return None


def _failure(device: torch.device, configuration: Configuration, tile: Tile) -> str | None:
    kernel, kind = configuration
    run_kernel, cases = _CHECKED[kernel]
    with defaults(device, kind):
        for case in cases(tile, kind.block_d):
            problem = make_problem(case, kind, device)
            true = testing.truth(problem, testing.output_grads(problem))
            try:
                results = run_kernel(problem, true, Trial(kernel, tile))
                testing.compare(problem, f"{configuration} with {tuple(tile)} on {case}", results, true)
            except TRANSIENT:
                raise
            except Exception as error:  # whatever a compiler or a card does wrong is what the check is there to find
                return f"{type(error).__name__}: {error}"
    return None


def make_problem(case: Case, kind: Kind, device: torch.device | str) -> Problem:
    """The call of a case. Random ids, lengths and masks could leave work out; these leave one row without a segment."""
    prefix_dtype = torch.float32 if kind.mixed else None
    problem = testing.make_problem(replace(case, dtype=kind.dtype, prefix_dtype=prefix_dtype), device)
    if kind.mixed:  # numbers that the kernels' products round to themselves: out and lse are given to backward exactly
        named = testing.float_tensors(problem)
        problem = testing.with_float_tensors(problem, {n: x.to(kind.dtype).to(x.dtype) for n, x in named.items()})
    rows, segments = torch.arange(case.B, device=device), torch.arange(case.N, device=device)
    problem = with_wide_bias(problem)
    if case.key_mask != "none":
        padding = 5 * (rows + 1)
        problem = replace(problem, key_mask=torch.arange(case.Tk, device=device) >= padding[:, None])
    if case.ids != "none":
        ids = torch.where(rows < case.B - 1, rows % case.N, -1)
        sets = tuple(replace(s, ids=ids, lengths=case.P - 11 * segments) for s in problem.sets)
        problem = replace(problem, sets=sets)
    return problem


def with_wide_bias(problem: Problem) -> Problem:
    """The same call with float32 biases, which take most room on a card."""
    sets = tuple(s if s.bias is None else replace(s, bias=s.bias.float()) for s in problem.sets)
    return replace(problem, attn_bias=None if problem.attn_bias is None else problem.attn_bias.float(), sets=sets)


@contextmanager
def defaults(device: torch.device, kind: Kind) -> Iterator[None]:
    """The settings of the process that bear on a check, for its time; random states stay as they were."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        if kind.dtype == torch.float32:
            torch.set_float32_matmul_precision(next(name for name, of in PRECISIONS.items() if of == kind.precision))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(like, dtype=dtype or like.dtype).fill_(torch.nan)


def _run_forward(problem: Problem, true: dict[str, Tensor], trial: Trial) -> dict[str, Tensor]:
    out, lse = _poisoned(problem.query), _poisoned(problem.query[..., 0].contiguous(), torch.float32)
    triton.forward(problem, out, lse, trial)
    return {"out": out, "lse": lse}


def _run_dq(problem: Problem, true: dict[str, Tensor], trial: Trial) -> dict[str, Tensor]:
    return _run_backward(problem, true, trial, lambda name: name == "query")


def _run_dkv(problem: Problem, true: dict[str, Tensor], trial: Trial) -> dict[str, Tensor]:
    return _run_backward(problem, true, trial, lambda name: name != "query")


def _run_short(problem: Problem, true: dict[str, Tensor], trial: Trial) -> dict[str, Tensor]:
    return _run_backward(problem, true, trial, lambda name: name not in ("key", "value"))


def _run_backward(
    problem: Problem, true: dict[str, Tensor], trial: Trial, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The wanted gradients, from the true output rounded as a forward kernel stores it."""
    grads = {
        name: _poisoned(tensor) if wanted(name) else None for name, tensor in testing.float_tensors(problem).items()
    }
    of_sets = tuple((grads[f"segment{i}.key"], grads[f"segment{i}.value"]) for i in range(len(problem.sets)))
    out, lse = torch.empty_like(problem.query).copy_(true["out"]), true["lse"].float()
    grad_out, grad_lse = testing.output_grads(problem)
    targets = Grads(grads["query"], grads["key"], grads["value"], of_sets)
    triton.backward(problem, out, lse, grad_out, grad_lse.float(), targets, trial)
    return {f"grad.{name}": grad for name, grad in grads.items() if grad is not None}


def _cases_by_row(tile: Tile, block_d: int) -> list[Case]:
    """Masks, lengths, a bank; the loops without a mask; packed rows of two sets, a ragged head dim, dropout; biases."""
    tokens, prefix = 2 * max(tile.queries, tile.keys) + 13, 2 * tile.keys + 9
    return [
        Case(B=4, H=2, Hkv=1, Tq=tokens, Tk=tokens + 5, N=2, P=prefix, D=block_d, ids="random", lengths="random",
             key_mask="left"),
        Case(B=1, H=2, Hkv=2, Tq=tokens + tile.keys, Tk=tokens + tile.keys, P=prefix + tile.keys, D=block_d),
        Case(B=3, H=2, Hkv=1, Tq=tokens, Tk=tokens, P=prefix, D=block_d * 3 // 4, packed=True, num_sets=2,
             dropout_p=0.2),
        Case(B=1, H=2, Hkv=1, Tq=tokens, Tk=tokens, P=prefix, D=block_d, key_mask="left", attn_bias=True,
             options=_BIAS),
    ]  # fmt: skip


def _cases_of_few_queries(tile: Tile, block_d: int) -> list[Case]:
    """Several tiles of readers; one, without masks; two sets, ragged, dropout; several of a row's own; biases."""
    tokens, prefix, rows = 2 * tile.keys + 13, 3 * tile.keys + 9, 2 * (tile.queries // 6 + 1) + 1
    return [
        Case(B=rows, H=4, Hkv=1, Tq=3, Tk=tokens, N=2, P=prefix, D=block_d, ids="random", lengths="random",
             key_mask="left"),
        Case(B=3, H=2, Hkv=2, Tq=1, Tk=tokens, P=prefix, D=block_d),
        Case(B=2, H=4, Hkv=2, Tq=7, Tk=tokens, P=prefix, D=block_d * 3 // 4, num_sets=2, dropout_p=0.2),
        Case(B=1, H=4, Hkv=1, Tq=17, Tk=tokens + tile.keys, P=prefix, D=block_d),
        Case(B=3, H=2, Hkv=1, Tq=5, Tk=tokens, P=prefix, D=block_d, key_mask="left", attn_bias=True, options=_BIAS),
    ]  # fmt: skip


def _cases_of_short(tile: Tile, block_d: int) -> list[Case]:
    """Blocks of 16, 64 and 32 keys: banks with rows that read none; a ragged head dim and dropout; biases."""
    tokens = 2 * max(tile.queries, tile.keys) + 13
    bank = Case(B=5, H=2, Hkv=1, Tq=tokens, Tk=tokens + 5, N=2, D=block_d, ids="random", lengths="random",
                key_mask="left")  # fmt: skip
    return [
        replace(bank, P=13),
        replace(bank, P=61),
        Case(B=3, H=4, Hkv=2, Tq=tokens, Tk=tokens, P=32, D=block_d * 3 // 4, dropout_p=0.2),
        Case(B=1, H=2, Hkv=1, Tq=tokens, Tk=tokens, P=32, D=block_d, key_mask="left", attn_bias=True, options=_BIAS),
    ]


_CHECKED: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[Tile, int], list[Case]]]] = {
    "forward": (_run_forward, _cases_by_row),
    "few": (_run_forward, _cases_by_row),
    "split": (_run_forward, _cases_of_few_queries),
    "dq": (_run_dq, _cases_by_row),
    "dkv": (_run_dkv, _cases_by_row),
    "short": (_run_short, _cases_of_short),
}
