"""Tuning of the Triton kernels, on request: for each configuration the fastest tile on the card at hand.

The table's tile, the safe one and a few neighbours are timed on usual shapes, through the launchers that every call
uses. Of those clearly faster than the present tile, the fastest that passes the self-check is kept with the verdict,
by card, driver, versions and kernel sources. Calls read it from there and never time anything, so that runs repeat bit
for bit; tuning anew can change the bits, as another card would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch

from prefix_fast import ops, selfcheck, testing
from prefix_fast.backends import cuda_vetting, triton, triton_backward, triton_forward, triton_short, triton_vetting
from prefix_fast.backends.cuda_vetting import DECODE, TRAINING, WORKS, Times
from prefix_fast.backends.problem import Grads, Problem
from prefix_fast.backends.shapes import Shape
from prefix_fast.backends.triton_call import make_call
from prefix_fast.backends.triton_config import Tile, device_of
from prefix_fast.backends.triton_vetting import Configuration, Kind, Verdict
from prefix_fast.testing import Case

Clock = Callable[[torch.device, Sequence[Callable[[], None]]], list[float]]

HEADS = {64: (12, 12), 128: (32, 8), 256: (16, 8)}  # H, Hkv: of models with head dims up to this
_TRAINING = (Case(B=8, Tq=512, Tk=512, P=200), Case(B=4, Tq=1024, Tk=1024, P=1024))
SHAPES = {
    "forward": _TRAINING, "dq": _TRAINING, "dkv": _TRAINING,
    "split": (Case(B=64, Tq=1, Tk=64, P=1024), Case(B=16, Tq=4, Tk=256, P=4096)),
    "few": (Case(B=64, Tq=1, Tk=64, P=64), Case(B=16, Tq=16, Tk=64, P=100)),
    "short": (Case(B=32, Tq=512, Tk=512, P=10), Case(B=32, Tq=512, Tk=512, P=32)),
}  # fmt: skip
OPTIONS = {"segment_bias": True, "softcap": 30.0, "window": 256}  # beside a bias and dropout: what takes most room
LEAST_GAIN = 0.03  # share of the time that a tile must save to be worth another than the present one
CALLS, ROUNDS = 10, 9  # of a tile in one measurement, and measurements of it


def seconds_of(device: torch.device, calls: Sequence[Callable[[], None]]) -> list[float]:
    """Median seconds of each call on the card, in turns; replayed as CUDA graphs, so that no host is timed."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.cuda.device(device):
        graphs = [_captured(call) for call in calls]
        for _ in range(1 + ROUNDS):
            for graph, found in zip(graphs, times, strict=True):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                found.append(start.elapsed_time(stop) / 1e3 / CALLS)
    return [statistics.median(found[1:]) for found in times]  # the first round warms up


def _captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for _ in range(CALLS):
            call()
    return graph


def tune(
    device: torch.device | str,
    wanted: Iterable[Configuration],
    *,
    progress: Callable[[Configuration], None] | None = None,
    clock: Clock = seconds_of,
) -> dict[Configuration, Verdict]:
    """Find the fastest right tile of each configuration that was not tuned yet, and keep it for all later calls.

    Args:
        device: of CUDA or ROCm.
        wanted: the configurations, as from `selfcheck.configurations`; those without a verdict are checked first.
        progress: called with each configuration before its check or its tuning.
        clock: times calls on the device.

    Returns:
        The verdicts. As in `selfcheck.run` a configuration is missing where memory or disk ran out.

    Raises:
        RuntimeError: a call is being traced or captured, or a kernel left the device unusable. Its configuration stays
            with the tile that it had; tuning again goes on with the next.
    """
    device = torch.device(device)
    index = selfcheck.index_of(device)
    device = device if index is None else torch.device(device.type, index)  # each thread has a current device
    verdicts = {}
    for configuration in wanted:
        verdict = selfcheck.run(device, [configuration], progress=progress).get(configuration)
        if verdict is None:
            continue
        if verdict.tuned is None and not verdict.refused:
            if progress is not None:
                progress(configuration)
            verdict = _tune(device, index, configuration, verdict, clock)
        verdicts[configuration] = verdict
    return verdicts


def time_backends(device: torch.device | str, *, clock: Clock = seconds_of) -> dict[str, Times]:
    """Time Triton's and CUDA's kernels on a decode step and on a training step, in bfloat16, and keep both times.

    Returns:
        The times by the kind of work, of which "auto" takes the faster; none where either is not right on the device.
    """
    index = selfcheck.index_of(torch.device(device))
    if index is None:
        return {}
    device = torch.device("cuda", index)
    found = {}
    for work, shape in zip(WORKS, (DECODE, TRAINING), strict=True):
        kind = triton_vetting.kind_of(shape.head_dim, torch.bfloat16, mixed=False)
        if cuda_vetting.verdict_of(index, kind) != "" or triton_vetting.refusals(index, kind):
            continue
        problem = testing.make_problem(_case_of(shape), device)
        runs = [partial(_run, ops.load_backend(name), problem, shape is TRAINING) for name in ("triton", "cuda")]
        cuda_vetting.record_times(index, work, *selfcheck.alone(clock, device, runs))
        found[work] = cuda_vetting.times_of(index, work)
    return found


def _case_of(shape: Shape) -> Case:
    ((_, P),) = shape.sets
    return Case(B=shape.rows, H=shape.heads, Hkv=shape.kv_heads, Tq=shape.queries, Tk=shape.keys, P=P, D=shape.head_dim,
                dtype=torch.bfloat16)  # fmt: skip


def _run(backend: ModuleType, problem: Problem, with_backward: bool) -> None:
    """A call as the operator makes it, with the gradients of a frozen model's training step."""
    out = torch.empty_like(problem.query)
    lse = torch.empty(problem.query.shape[:-1], dtype=torch.float32, device=out.device)
    backend.forward(problem, out, lse)
    if with_backward:
        query, key, value = (torch.empty_like(t) for t in (problem.query, problem.key, problem.value))
        of_sets = tuple((torch.empty_like(s.key), torch.empty_like(s.value)) for s in problem.sets)
        backend.backward(problem, out, lse, out, None, Grads(query, key, value, of_sets))


def _tune(
    device: torch.device, index: int | None, configuration: Configuration, verdict: Verdict, clock: Clock
) -> Verdict:
    """The verdict with its fastest tile; as it was where memory ran out."""
    keep = partial(triton_vetting.record, index, configuration, verdict.failure, verdict.safe_failure)
    keep(verdict.checked)  # should a kernel end this process, the next one goes on after it
    try:
        ratios = selfcheck.alone(_ratios, device, index, configuration, verdict, clock)
        for tile in sorted(ratios, key=ratios.__getitem__):
            if ratios[tile] > 1 - LEAST_GAIN:
                break
            if not selfcheck.alone(_has_room, device, index, configuration, verdict.checked, tile):
                continue
            if selfcheck.failure(device, configuration, tile) is None:
                return keep(tile)
            _raise_fault(device, configuration, tile)
    except selfcheck.TRANSIENT:
        return keep()
    except KeyboardInterrupt:
        keep()
        raise
    return keep(verdict.checked)


def _ratios(
    device: torch.device, index: int | None, configuration: Configuration, verdict: Verdict, clock: Clock
) -> dict[Tile, float]:
    """Of each tile that runs, its time over the present one's: the geometric mean of the shapes. Empty: none is timed.

    A tile is timed before it is checked, which takes longer: only one that would be chosen is worth a check.
    """
    kernel, kind = configuration
    present, known_wrong = verdict.checked, () if verdict.failure is None else (verdict.tile,)
    others = [tile for tile in triton_vetting.choices(index, configuration) if tile not in (present, *known_wrong)]
    logs: list[dict[Tile, float]] = []
    with selfcheck.defaults(device, kind):
        for shape in SHAPES[kernel]:
            launch = _launcher(device, index, configuration, shape)
            if launch is None:
                continue
            launch(present)
            others = [tile for tile in others if _runs(launch, device, configuration, tile)]
            of_present, *seconds = clock(device, [partial(launch, tile) for tile in (present, *others)])
            logs.append({tile: math.log(s / of_present) for tile, s in zip(others, seconds, strict=True)})
    return {tile: math.exp(statistics.fmean(log[tile] for log in logs)) for tile in others} if logs else {}


def _launcher(
    device: torch.device, index: int | None, configuration: Configuration, shape: Case
) -> Callable[[Tile], None] | None:
    """Runs the kernel with a given tile on a call of that shape; None: such calls do not run it."""
    kernel, kind = configuration
    problem = _problem(shape, kind, device)
    call = make_call(problem, device_of(index), triton.interpreting())._replace(spare=False)
    tiles = triton_vetting.tiles_of_call(index, kind)
    grads, grad_out = _wanted(problem, kernel), testing.output_grads(problem)[0]
    out, lse = grad_out.clone(), torch.full(problem.query.shape[:-1], math.log(shape.P + shape.Tk), device=device)
    if kernel == "short" and not triton_short.fuses(call, tiles.short, grads):
        return None

    def launch(tile: Tile) -> None:
        chosen = tiles._replace(**{kernel: tile})
        with torch.cuda.device_of(problem.query):
            if kernel in ("dq", "dkv", "short"):
                triton_backward.backward(call, chosen, out, lse, grad_out, None, grads)
            else:
                triton_forward.forward(call, chosen, out, lse)

    return launch


def _has_room(device: torch.device, index: int | None, configuration: Configuration, present: Tile, tile: Tile) -> bool:
    """Whether a call with every option launches with the tile, if it does with the present one."""
    shape = replace(SHAPES[configuration.kernel][0], attn_bias=True, dropout_p=0.1, options=OPTIONS)
    with selfcheck.defaults(device, configuration.kind):
        launch = _launcher(device, index, configuration, shape)
        if launch is None or not _runs(launch, device, configuration, present):
            return True
        return _runs(launch, device, configuration, tile)


def _problem(shape: Case, kind: Kind, device: torch.device) -> Problem:
    heads, kv_heads = next(of for size, of in HEADS.items() if kind.block_d <= size)
    prefix_dtype = torch.float32 if kind.mixed else None
    sizes = replace(shape, H=heads, Hkv=kv_heads, D=kind.block_d, dtype=kind.dtype, prefix_dtype=prefix_dtype)
    return selfcheck.with_wide_bias(testing.make_problem(sizes, device))


def _wanted(problem: Problem, kernel: str) -> Grads:
    """Where the gradients go that the kernel computes."""
    query = None if kernel == "dkv" else torch.empty_like(problem.query)
    key, value = (torch.empty_like(t) if kernel == "dkv" else None for t in (problem.key, problem.value))
    none = (None, None)
    sets = (none if kernel == "dq" else (torch.empty_like(s.key), torch.empty_like(s.value)) for s in problem.sets)
    return Grads(query, key, value, tuple(sets))


def _runs(launch: Callable[[Tile], None], device: torch.device, configuration: Configuration, tile: Tile) -> bool:
    """Whether the tile compiles and finds room on the card."""
    try:
        launch(tile)
        runs = True
    except selfcheck.TRANSIENT:
        raise
    except Exception:  # whatever a compiler or a launch has against a tile
        runs = False
    _raise_fault(device, configuration, tile)
    return runs


def _raise_fault(device: torch.device, configuration: Configuration, tile: Tile) -> None:
    fault = selfcheck.fault_of(device)
    if fault is not None:
        raise RuntimeError(
            f"tuning.tune: expected the kernel {configuration} with the tile {tuple(tile)} to leave the device usable, "
            f"got {fault}; its tile stays as it was: start this process again, which goes on with the next kernel"
        ) from fault
