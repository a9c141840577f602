"""A training step of a float32 model that computes in bfloat16, against float32 and against autocast."""

from typing import Any

import pytest
import torch
from compare import Contender, compare
from hosts import QUICK_STEP, STEP, TrainingStep
from memory import peak_memory
from torch import Tensor

from prefix_fast import half

OURS, FULL = "compute_dtype=bfloat16", "patch(model, prefix)"
LACKING = half.lacking(torch.device("cpu"), torch.bfloat16)


class AutocastStep(TrainingStep):
    """The step of a model that is patched for its own dtype, under the user's autocast."""

    def __call__(self) -> tuple[Tensor, ...]:
        """One step."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().__call__()


@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_half_compute(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_STEP if quick else STEP
    peak = {name: peak_memory(name, "step", quick) / 2**30 for name in (OURS, FULL)}
    record(
        compare(
            benchmark,
            group="bfloat16 compute",
            case=f"{size}, labels on half",
            ours=Contender(OURS, TrainingStep(OURS, size)),
            rivals=[Contender(FULL, TrainingStep(FULL, size)), Contender("autocast", AutocastStep(FULL, size))],
            rounds=1 if quick else 6,
            tolerance=2e-2,
            headlines=[FULL],
            notes={"peak": f"{peak[OURS]:.2f} against {peak[FULL]:.2f} GiB"},
        )
    )
