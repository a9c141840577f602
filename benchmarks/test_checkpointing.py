"""A training step of a patched GPT-2 under gradient checkpointing that keeps attention: time and memory."""

from typing import Any

from compare import Contender, compare
from hosts import LONG_STEP, QUICK_STEP, TrainingStep
from memory import RETURNED, work_memory

OURS, AGAIN, WITHOUT = "checkpointing, attention kept", "checkpointing", "patch(model, prefix)"


def test_checkpointing(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_STEP if quick else LONG_STEP
    memory = {name: work_memory(name, "long-step", quick, RETURNED) for name in (OURS, AGAIN, WITHOUT)}
    usual = {name: work_memory(name, "long-step", quick, {}) for name in (OURS, AGAIN, WITHOUT)}
    if not quick:
        assert memory[OURS] < memory[WITHOUT] / 2
    rows = compare(
        benchmark,
        group="gradient checkpointing",
        case=f"{size}, labels on half",
        ours=Contender(OURS, TrainingStep(OURS, size)),
        rivals=[Contender(name, TrainingStep(name, size)) for name in (AGAIN, WITHOUT)],
        rounds=1 if quick else 4,
        tolerance=0.0,
        notes={
            "memory of the step": ", ".join(
                f"{name} {memory[name] / 2**20:.0f} MiB ({usual[name] / 2**20:.0f} as glibc keeps it)"
                for name in memory
            )
        },
    )
    record(rows)
