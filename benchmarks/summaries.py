"""Training steps on batches of texts and summaries, by a BART of BART-base's shape.

Lengths are fixed: 30 % of the sources' positions are padding, and 40 % of the targets'. All contenders get the same
weights and the same prefix.
"""

from dataclasses import dataclass, replace

import torch
from hosts import Step
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from prefix_fast import patch

SOURCES = (128, 121, 112, 96, 84, 70, 58, 47)  # tokens of each row
TARGETS = (44, 36, 30, 27, 24, 20, 16, 13)


@dataclass(frozen=True)
class Summaries:
    """The model and the work."""

    layers: int = 6
    width: int = 768
    rows: int = 8
    prefix: int = 32
    vocabulary: int = 50265

    def __str__(self) -> str:
        return f"BART {self.layers}+{self.layers} layers, B{self.rows} S{SOURCES[0]} T{TARGETS[0]} P{self.prefix}"


QUICK = replace(Summaries(), layers=1, width=64, rows=3, prefix=4, vocabulary=500)


def peft_model(size: Summaries) -> PeftModel:
    """PEFT's prefix tuning, which reaches the decoder's self-attention, around a BART with random weights."""
    parts = {"layers": size.layers, "attention_heads": size.width // 64, "ffn_dim": 4 * size.width}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in parts.items()}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=size.vocabulary, d_model=size.width, dropout=0.0, **sizes)
    prefix = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=size.prefix, prefix_projection=False)
    return get_peft_model(BartForConditionalGeneration(config), prefix)


class SummaryStep(Step):
    """Forward, backward and AdamW on the prefix.

    Args:
        padding_free: as `patch` takes it; None: the PeftModel is not patched.

    Attributes:
        padding: the parts of sources and of targets that are padding.
    """

    def __init__(self, size: Summaries, padding_free: bool | None) -> None:
        model = peft_model(size)
        super().__init__(model if padding_free is None else patch(model, padding_free=padding_free))
        generator = torch.Generator().manual_seed(0)

        def tokens(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            ends, width = torch.tensor(lengths[: size.rows]), lengths[0]
            ids = torch.randint(3, size.vocabulary, (size.rows, width), generator=generator)
            return ids, torch.arange(width) < ends[:, None]

        (sources, seen), (targets, labelled) = tokens(SOURCES), tokens(TARGETS)
        self.padding = tuple(1 - float(mask.float().mean()) for mask in (seen, labelled))
        self.given = {
            "input_ids": sources.masked_fill(~seen, 1),
            "attention_mask": seen.long(),
            "labels": targets.masked_fill(~labelled, -100),
        }

    def batch(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        return self.given
