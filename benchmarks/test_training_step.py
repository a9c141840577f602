"""A training step with a prefix against PEFT's: GPT-2, its products beside it; texts about tables; BART's summaries."""

from typing import Any

import pytest
from compare import Contender, compare
from floor import LIBRARIES, Floor
from hosts import LONG_STEP, QUICK_REFERENCES, QUICK_STEP, REFERENCES, STEP, ReferencesStep, Size, TrainingStep
from memory import peak_memory
from summaries import QUICK as QUICK_SUMMARIES
from summaries import Summaries, SummaryStep
from table_to_text import QUICK, Texts, TextStep

PEFT = "PEFT"
STEPS = {  # of a case: the size, ours, the work of `peak_memory`
    "peft-model": (STEP, "patch(peft_model)", "step"),
    "plain-model": (STEP, "patch(model, prefix)", "step"),
    "long-rows": (LONG_STEP, "patch(model, prefix)", "long-step"),
}


@pytest.mark.parametrize("case", STEPS)
def test_training_step(benchmark: Any, record: Any, quick: bool, case: str) -> None:
    usual, ours, work = STEPS[case]
    size = QUICK_STEP if quick else usual
    peak = {name: peak_memory(name, work, quick) for name in (ours, PEFT)}
    if not quick:
        assert peak[ours] < peak[PEFT]
    slow = usual is LONG_STEP
    record(
        compare(
            benchmark,
            group="training step",
            case=f"{size}, {ours}",
            ours=Contender(ours, TrainingStep(ours, size)),
            rivals=[Contender(PEFT, TrainingStep(PEFT, size), rounds=1 if slow else None), *floors(size)],
            rounds=1 if quick else 3 if slow else 4,
            tolerance=1e-4,
            headlines=[PEFT],
            notes={"peak": f"{peak[ours] / 2**30:.2f} against {peak[PEFT] / 2**30:.2f} GiB"},
        )
    )


def floors(size: Size) -> list[Contender]:
    """The step's products with frozen weights through each library: what no step can fall below."""
    return [Contender(f"its products by {name}", Floor(size, name), same_task=False) for name in LIBRARIES]


def test_padded_texts(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK if quick else Texts()
    ours = TextStep(size, patched=True)
    record(
        compare(
            benchmark,
            group="training step",
            case=f"{size}, {ours.padding:.0%} padding, labels on {ours.labelled:.0%}",
            ours=Contender("patch(peft_model)", ours),
            rivals=[Contender(PEFT, TextStep(size, patched=False))],
            rounds=1 if quick else 4,
            tolerance=1e-4,
            headlines=[PEFT],
        )
    )


def test_padded_sources_and_targets(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_SUMMARIES if quick else Summaries()
    ours = SummaryStep(size, padding_free=True)
    sources, targets = ours.padding
    record(
        compare(
            benchmark,
            group="training step",
            case=f"{size}, {sources:.0%} and {targets:.0%} padding",
            ours=Contender("patch(peft_model)", ours),
            rivals=[
                Contender("padding_free=False", SummaryStep(size, padding_free=False)),
                Contender(PEFT, SummaryStep(size, padding_free=None)),
            ],
            rounds=1 if quick else 5,
            tolerance=1e-4,
            headlines=["padding_free=False", PEFT],
        )
    )


def test_texts_that_share_tables(benchmark: Any, record: Any, quick: bool) -> None:
    size = Texts(**{**vars(QUICK if quick else Texts(rows=32)), "per_table": 2 if quick else 8})
    record(
        compare(
            benchmark,
            group="training step",
            case=str(size),
            ours=Contender("shared sources", TextStep(size, patched=True, shared=True)),
            rivals=[
                Contender("ordinary batch, patched", TextStep(size, patched=True)),
                Contender(PEFT, TextStep(size, patched=False), rounds=2),
            ],
            rounds=1 if quick else 4,
            tolerance=1e-4,
            headlines=[PEFT],
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
