"""Training steps on batches like E2E's (tables and short texts about them), by a Llama of SmolLM2-135M's shape.

Lengths are drawn as SmolLM2's tokenizer gives them on E2E: tables of 31.5 tokens and texts of 26.4 on average, each
table with several texts. Labels are on the texts. All contenders get the same weights and the same prefix.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hosts import Step
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prefix_fast import SharedSourceCollator, patch

TABLE, TEXT = (31.5, 9.0), (26.4, 9.5)  # mean and standard deviation of the tokens
LEAST = 6


@dataclass(frozen=True)
class Texts:
    """The model and the work: `rows` texts, each `per_table` of them about one table."""

    layers: int = 30
    hidden: int = 576
    rows: int = 8
    per_table: int = 1
    prefix: int = 16
    vocabulary: int = 49152

    def __str__(self) -> str:
        about = "" if self.per_table == 1 else f", {self.per_table} texts of each table"
        return f"SmolLM2-135M's shape on E2E's, B{self.rows} P{self.prefix}{about}"


QUICK = Texts(layers=2, hidden=64 * 3, rows=4, prefix=4, vocabulary=500)


def peft_model(size: Texts) -> PeftModel:
    """PEFT's prefix tuning with its MLP around a Llama with random weights."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 192,
        vocab_size=size.vocabulary,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    prefix = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=size.prefix, prefix_projection=True, encoder_hidden_size=512
    )
    return get_peft_model(LlamaForCausalLM(config), prefix)


class TextStep(Step):
    """Forward, backward and AdamW on the prefix.

    Args:
        patched: whether the PeftModel is patched. shared: each table is computed once.

    Attributes:
        padding, labelled: the parts of the padded batch that are padding, and that have a label.
    """

    def __init__(self, size: Texts, patched: bool, shared: bool = False) -> None:
        model = peft_model(size)
        super().__init__(patch(model) if patched else model)
        generator = torch.Generator().manual_seed(0)

        def tokens(mean: float, deviation: float) -> list[int]:
            length = max(int(torch.normal(mean, deviation, (1,), generator=generator)), LEAST)
            return torch.randint(1, size.vocabulary, (length,), generator=generator).tolist()

        tables = [tokens(*TABLE) for _ in range(size.rows // size.per_table)]
        features = [
            {"source_ids": tables[row // size.per_table], "target_ids": tokens(*TEXT)} for row in range(size.rows)
        ]
        rows = padded(features)
        self.padding = 1 - float(rows["attention_mask"].float().mean())
        self.labelled = float((rows["labels"] >= 0).float().mean())
        self.given: dict[str, Any] = SharedSourceCollator(0)(features) if shared else rows

    def batch(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        return self.given


def padded(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Tables and texts as rows with padding on the right, labels on the texts."""
    rows = [feature["source_ids"] + feature["target_ids"] for feature in features]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for row, feature in zip(labels, features, strict=True):
        row[: len(feature["source_ids"])] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
