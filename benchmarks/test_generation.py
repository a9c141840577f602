"""Greedy generation with a long prefix against PEFT, whose tokens must be ours, and against no prefix at all."""

from typing import Any

from compare import Contender, compare
from hosts import GENERATION, QUICK_GENERATION, Generation


def test_greedy_generation(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_GENERATION if quick else GENERATION
    ours = "patch(peft_model)"
    record(
        compare(
            benchmark,
            group="generation",
            case=f"{size}, {size.new} new tokens",
            ours=Contender(ours, Generation(ours, size)),
            rivals=[
                Contender("no prefix at all", Generation("no prefix", size), same_task=False),
                Contender("PEFT", Generation("PEFT", size), rounds=2),
            ],
            rounds=1 if quick else 4,
            tolerance=0.0,
            headlines=["PEFT", "no prefix at all"],
        )
    )
