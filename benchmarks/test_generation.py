"""Generation with a long prefix against PEFT, whose tokens must be ours, and against no prefix at all."""

from typing import Any

import torch
from compare import Contender, compare
from hosts import GENERATION, MANY_ROWS, QUICK_GENERATION, Generation
from memory import peak_memory
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from prefix_fast import patch

OURS = "patch(peft_model)"


def test_greedy_generation(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_GENERATION if quick else GENERATION
    record(
        compare(
            benchmark,
            group="generation",
            case=f"{size}, {size.new} new tokens",
            ours=Contender(OURS, Generation(OURS, size)),
            rivals=[
                Contender("no prefix at all", Generation("no prefix", size), same_task=False),
                Contender("PEFT", Generation("PEFT", size), rounds=2),
            ],
            rounds=1 if quick else 4,
            tolerance=0.0,
            headlines=["PEFT", "no prefix at all"],
        )
    )


def test_generation_of_many_rows(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_GENERATION if quick else MANY_ROWS
    peaks = [peak_memory(name, "generation", quick) / 2**30 for name in (OURS, "no prefix")]
    record(
        compare(
            benchmark,
            group="generation",
            case=f"{size}, {size.new} new tokens",
            ours=Contender(OURS, Generation(OURS, size)),
            rivals=[Contender("no prefix at all", Generation("no prefix", size), same_task=False)],
            rounds=1 if quick else 4,
            tolerance=0.0,
            notes={"peak": f"{peaks[0]:.2f} against {peaks[1]:.2f} GiB"},
        )
    )


class Beams:
    """Beam search by a BART with random weights, of BART-base's shape."""

    def __init__(self, quick: bool, kind: str) -> None:
        layers, width, heads, words, prefix, rows, source, self.new = (
            (1, 32, 2, 500, 8, 2, 6, 3) if quick else (6, 768, 12, 50265, 200, 8, 64, 32)
        )
        parts = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
        sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in parts.items()}
        torch.manual_seed(0)
        config = BartConfig(vocab_size=words, d_model=width, dropout=0.0, **sizes, forced_eos_token_id=None)
        self.model = BartForConditionalGeneration(config)
        if kind != "no prefix":
            tuning = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=prefix, prefix_projection=False)
            self.model = get_peft_model(self.model, tuning)
        if kind == OURS:
            patch(self.model)
        self.model.eval()
        self.input_ids = torch.randint(3, words, (rows, source), generator=torch.Generator().manual_seed(0))
        self.case = f"BART {layers}+{layers} layers, B{rows} S{source} P{prefix}, 4 beams, {self.new} new tokens"

    def __call__(self) -> tuple[Tensor, ...]:
        """The tokens of the best beams."""
        length = {"max_new_tokens": self.new, "min_new_tokens": self.new}
        mask = torch.ones_like(self.input_ids)
        return (
            self.model.generate(input_ids=self.input_ids, attention_mask=mask, num_beams=4, do_sample=False, **length),
        )


def test_beams_of_an_encoder_decoder(benchmark: Any, record: Any, quick: bool) -> None:
    ours = Beams(quick, OURS)
    record(
        compare(
            benchmark,
            group="generation",
            case=ours.case,
            ours=Contender(OURS, ours),
            rivals=[
                Contender("no prefix at all", Beams(quick, "no prefix"), same_task=False),
                Contender("PEFT", Beams(quick, "PEFT"), rounds=2),
            ],
            rounds=1 if quick else 4,
            tolerance=0.0,
            headlines=["PEFT"],
        )
    )
