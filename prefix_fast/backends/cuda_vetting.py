"""Whether a card may run the CUDA kernels for "auto", and when they run instead of Triton's.

A verdict is about a kind of call (head dim, dtypes) on a card with its driver and the compiled kernels;
`prefix_fast.selfcheck` finds it. Of calls that both can run, CUDA's kernels take those with few queries or those with
many, where they were faster on this card (`prefix-fast doctor --tune` measures it) or, unmeasured, where the cost model
predicts it. All of it is kept as small JSON files; a call looks it up and never checks or times anything.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefix_fast.backends import triton_cost
from prefix_fast.backends.shapes import Shape
from prefix_fast.backends.triton_config import device_of, tiles_for
from prefix_fast.backends.triton_vetting import Kind, driver_of, record_file, write_record

MODULE = "prefix_fast._native_cuda"
FEW_QUERIES = 8  # of a row: decode and verification
WORKS = ("few queries", "many queries")
# Shapes whose predicted times stand for all calls of a kind: a decode step, and a training step's forward and backward.
DECODE = Shape(64, 32, 8, 1, 64, 128, 2, ((1, 1024),))
TRAINING = Shape(8, 32, 8, 1024, 1024, 128, 2, ((1, 200),))
# Share of the rate of matrix products that mma.sync reaches where an architecture has wider instructions of its own,
# which Triton uses. Assumed, as the efficiencies of the cost model are.
MMA_SYNC = {"sm_90": 0.6, "sm_100": 0.3}
_FORMAT = 1


class Times(NamedTuple):
    """Seconds of both kernels on calls of a kind of work."""

    triton: float
    cuda: float
    measured: bool  # on this card; else predicted

    @property
    def faster(self) -> str:
        """The name of the backend; Triton's where both take the same."""
        return "cuda" if self.cuda < self.triton else "triton"


_verdicts: dict[tuple[int, Kind], str | None] = {}
_times: dict[tuple[int, str], Times] = {}


def verdict_of(index: int, kind: Kind) -> str | None:
    """What the self-check found on device `index`: "" right, else what was wrong; None: it has not run."""
    if (index, kind) not in _verdicts:
        found = _read(index, f"cuda-{kind}")
        _verdicts[index, kind] = found if isinstance(found, str) else None
    return _verdicts[index, kind]


def record_verdict(index: int, kind: Kind, failure: str | None) -> None:
    """Keep what the self-check found; None: nothing wrong."""
    _verdicts[index, kind] = failure or ""
    _write(index, f"cuda-{kind}", failure or "")


def forget_verdict(index: int, kind: Kind) -> None:
    """Take the kind for unchecked, in this process: kernels that were found wrong are refused, also to a check."""
    _verdicts[index, kind] = None


def times_of(index: int, work: str) -> Times:
    """Of both kernels on this card: those on record, else those predicted."""
    if (index, work) not in _times:
        found = _read(index, f"cuda-times-{work}")
        right = isinstance(found, list) and len(found) == 2 and all(isinstance(s, float) and s > 0 for s in found)
        _times[index, work] = Times(found[0], found[1], True) if right else predicted(index, work)
    return _times[index, work]


def record_times(index: int, work: str, triton: float, cuda: float) -> None:
    """Keep what both took on this card."""
    _times[index, work] = Times(triton, cuda, True)
    _write(index, f"cuda-times-{work}", [triton, cuda])


def predicted(index: int, work: str) -> Times:
    """Roofline times on the card of that architecture: the same walk; CUDA's decode has one launch instead of two."""
    device = device_of(index)
    card = triton_cost.card_of(device)
    share = MMA_SYNC.get(device.architecture, 1.0)
    slower = card._replace(half_flops=share * card.half_flops, tf32_flops=share * card.tf32_flops)
    if work == WORKS[0]:
        tile = tiles_for(device, DECODE.head_dim, torch.bfloat16).split
        split = triton_cost.candidates(device, DECODE, tile)[0]
        of_triton, of_cuda = (triton_cost.split_seconds(rates, DECODE, split) for rates in (card, slower))
        return Times(of_triton, of_cuda - triton_cost.LAUNCH, False)
    of_triton, of_cuda = (
        triton_cost.forward_seconds(rates, TRAINING) + triton_cost.backward_seconds(rates, TRAINING)
        for rates in (card, slower)
    )
    return Times(of_triton, of_cuda, False)


def is_preferred(index: int, kind: Kind, few: bool) -> bool:
    """Whether "auto" takes the CUDA kernels before Triton's: the self-check found them right, and they are faster."""
    return verdict_of(index, kind) == "" and times_of(index, WORKS[0 if few else 1]).faster == "cuda"


def refusals(index: int, kind: Kind) -> list[str]:
    """Why the kernels cannot run a kind of call on device `index`."""
    failure = verdict_of(index, kind)
    if not failure:
        return []
    return [f"the self-check found the CUDA kernels wrong on this device for {kind}: {failure}; run prefix-fast doctor "
            "--recheck after an upgrade"]  # fmt: skip


@functools.cache
def environment_of(index: int) -> dict[str, Any]:
    """What verdicts and times on device `index` hold for."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "card": properties.name, "capability": f"{properties.major}.{properties.minor}", "driver": driver_of(),
        "torch": str(torch.__version__), "kernels": _hash_of_extension(), "format": _FORMAT,
    }  # fmt: skip


def _read(index: int, name: str) -> Any:
    """What is on disk; None where there is nothing, or it is damaged or about something else."""
    try:
        entry = json.loads(record_file(environment_of(index), name).read_bytes())
        return entry["found"] if entry["environment"] == environment_of(index) else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: no home folder, deep nesting
        return None


def _write(index: int, name: str, found: Any) -> None:
    environment = environment_of(index)
    write_record(environment, name, {"environment": environment, "found": found})


def _hash_of_extension() -> str:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.origin:
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]
