"""A training step of GPT-2 with a prefix: against PEFT's, with peak memory in separate processes; shared sources."""

from typing import Any

import pytest
from compare import Contender, compare
from hosts import QUICK_REFERENCES, QUICK_STEP, REFERENCES, STEP, ReferencesStep, TrainingStep
from memory import peak_memory


@pytest.mark.parametrize("ours", ["patch(peft_model)", "patch(model, prefix)"], ids=["peft-model", "plain-model"])
def test_training_step(benchmark: Any, record: Any, quick: bool, ours: str) -> None:
    size = QUICK_STEP if quick else STEP
    peak = {name: peak_memory(name, "step", quick) for name in (ours, "PEFT")}
    if not quick:
        assert peak[ours] < peak["PEFT"]
    record(
        compare(
            benchmark,
            group="training step",
            case=f"{size}, {ours}",
            ours=Contender(ours, TrainingStep(ours, size)),
            rivals=[Contender("PEFT", TrainingStep("PEFT", size))],
            rounds=1 if quick else 4,
            tolerance=1e-4,
            headlines=["PEFT"],
            notes={"peak": f"{peak[ours] / 2**30:.2f} against {peak['PEFT'] / 2**30:.2f} GiB"},
        )
    )


def test_shared_sources(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_REFERENCES if quick else REFERENCES
    record(
        compare(
            benchmark,
            group="training step",
            case=f"{size}, {ReferencesStep.PER_SOURCE} references of each source, labels on half",
            ours=Contender("shared sources", ReferencesStep(True, size)),
            rivals=[Contender("ordinary batch", ReferencesStep(False, size))],
            rounds=1 if quick else 4,
            tolerance=1e-4,
            headlines=["ordinary batch"],
        )
    )
