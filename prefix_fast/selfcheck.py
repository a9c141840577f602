"""The self-check of the Triton kernels: each configuration against the oracle on the device that is to run it.

One kernel at a time runs on small calls with several tiles each way and ragged ends, through the launchers that every
call uses, into outputs full of NaN; its results must be within the error budget of `prefix_fast.testing`. `patch`
checks what its model needs, `prefix-fast doctor` everything; `backends.triton_vetting` keeps what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from prefix_fast import dispatch, testing
from prefix_fast.backends import triton, triton_vetting
from prefix_fast.backends.problem import Facts, Grads, Problem
from prefix_fast.backends.triton_config import PRECISIONS, Tile
from prefix_fast.backends.triton_vetting import Configuration, Kind, Trial, Verdict
from prefix_fast.testing import Case

BLOCKS = (16, 32, 64, 128, 256)  # padded head dims
HALVES = (torch.bfloat16, torch.float16)


def all_kinds() -> list[Kind]:
    """Every kind of call that the kernels serve."""
    of_halves = [(dtype, "ieee", mixed) for dtype in HALVES for mixed in (False, True)]
    of_singles = [(torch.float32, precision, False) for precision in PRECISIONS.values()]
    return [Kind(block_d, *rest) for block_d in BLOCKS for rest in (*of_halves, *of_singles)]


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
        The verdicts. A configuration is missing where memory ran out: it stays unchecked, and safe tiles serve it.

    Raises:
        RuntimeError: a call is being traced or captured, or a kernel left the device unusable; that is recorded too.
    """
    device = torch.device(device)
    index = _index_of(device)
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


def vet_model(devices: Iterable[torch.device], backend: str, head_dim: int, dtypes: Iterable[torch.dtype]) -> None:
    """Check what a model on these devices needs, where Triton is what `backend` runs and no verdict exists.

    Does nothing for other devices, and while a call is being traced or captured.
    """
    for device in sorted(set(devices), key=str):
        if device.type != "cuda" or busy(device):
            continue
        for dtype in dtypes:
            for use in ((), ("mixed_prefix",)) if dtype in HALVES else ((),):
                if _chosen(backend, Facts(device.type, dtype, head_dim, use, _index_of(device) or 0)) == "triton":
                    run(device, configurations([triton_vetting.kind_of(head_dim, dtype, bool(use))]))


def busy(device: torch.device) -> bool:
    """Whether a check must not run now, because a call is being traced or a CUDA graph is being captured."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or captured


def _index_of(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _chosen(backend: str, facts: Facts) -> str | None:
    try:
        return dispatch.choose(backend, *facts)
    except NotImplementedError:
        return None  # the call itself will say why


def _check(device: torch.device, index: int | None, configuration: Configuration) -> Verdict | None:
    """Check the table's tile and, where it fails, the safe one; None: memory ran out."""
    table, safe = triton_vetting.candidates(index, configuration)
    try:
        failure = _failure(device, configuration, table)
        safe_failure = None if failure is None or safe == table else _failure(device, configuration, safe)
    except torch.OutOfMemoryError:
        return None
    verdict = triton_vetting.record(index, configuration, failure, safe_failure)
    if failure is not None and index is not None:
        try:
            torch.cuda.synchronize(index)
        except RuntimeError as error:
            raise RuntimeError(
                f"selfcheck.run: expected the kernel {configuration} to leave the device usable, got {error}; the "
                "failure is recorded: start this process again, and a safe tile takes its place"
            ) from error
    return verdict


def _failure(device: torch.device, configuration: Configuration, tile: Tile) -> str | None:
    """Why the tile is wrong, or None."""
    kernel, kind = configuration
    run_kernel, cases = _CHECKED[kernel]
    with _precision(kind):
        for case in cases(tile, kind.block_d):
            dtypes = {"dtype": kind.dtype, "prefix_dtype": torch.float32 if kind.mixed else None}
            problem = testing.make_problem(replace(case, **dtypes), device)  # type: ignore[arg-type]
            try:
                true = testing.truth(problem, testing.output_grads(problem))
                results = run_kernel(problem, true, Trial(kernel, tile))
                testing.compare(problem, f"{configuration} with {tuple(tile)} on {case}", results, true)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler or a card does wrong is what the check is there to find
                return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _precision(kind: Kind) -> Iterator[None]:
    """Run with the precision of float32 products that the kind has."""
    before = torch.get_float32_matmul_precision()
    if kind.dtype == torch.float32:
        torch.set_float32_matmul_precision(next(name for name, of in PRECISIONS.items() if of == kind.precision))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    """Masks, lengths and a bank; the loops without a mask; packed rows of two sets, a ragged head dim, dropout."""
    tokens, prefix = 2 * tile.queries + 13, 2 * tile.keys + 9
    return [
        Case(B=3, H=4, Hkv=2, Tq=tokens, Tk=tokens + 5, N=2, P=prefix, D=block_d, ids="random", lengths="random",
             key_mask="left", seed=1),
        Case(B=2, H=2, Hkv=2, Tq=tokens + tile.keys, Tk=tokens + tile.keys, P=prefix + tile.keys, D=block_d),
        Case(B=3, H=4, Hkv=1, Tq=tokens, Tk=tokens, P=prefix, D=block_d * 3 // 4, packed=True, num_sets=2,
             dropout_p=0.2),
    ]  # fmt: skip


_CHECKED: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[Tile, int], list[Case]]]] = {
    "forward": (_run_forward, _cases_by_row),
    "dq": (_run_dq, _cases_by_row),
    "dkv": (_run_dkv, _cases_by_row),
}
