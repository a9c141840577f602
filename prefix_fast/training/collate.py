"""From example texts to token rows and batches: labels on the target only, padding on the right or on the left."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefix_fast.training.tables import Example

IGNORED_LABEL = -100


@dataclass(frozen=True)
class RowFormat:
    """How a row is put together.

    A training row is ``[bos] source separator target eos``; bos only if the tokenizer itself starts texts with one.
    A source longer than ``max_source_tokens`` loses its end (the separator always stays). A target longer than
    ``max_target_tokens``, eos included, loses its end and then has no eos: the model is not taught to stop there.
    """

    separator: str = "\n"
    max_source_tokens: int = 256
    max_target_tokens: int = 64

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("max_source_tokens", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"RowFormat: expected {name} >= 1, got {getattr(self, name)}; raise it")


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one example: what is read, and what is to be predicted."""

    source_ids: list[int]
    target_ids: list[int]

    def __len__(self) -> int:
        return len(self.source_ids) + len(self.target_ids)


class RowTokenizer:
    """Tokenise examples in one :class:`RowFormat`; source, separator and target are tokenised apart."""

    def __init__(self, tokenizer: Any, row_format: RowFormat) -> None:
        """Keep the tokenizer; it must have an end-of-sequence token."""
        if tokenizer.eos_token_id is None:
            raise ValueError("RowTokenizer: expected a tokenizer with an eos token, got none; set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.row_format = row_format
        start = tokenizer("x").input_ids[:1]
        self._start = start if start == [tokenizer.bos_token_id] else []
        self._separator = self._ids(row_format.separator) if row_format.separator else []

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def source_ids(self, source: str) -> list[int]:
        """Token ids of a row up to its target."""
        ids = self._start + self._ids(source)[: self.row_format.max_source_tokens] + self._separator
        if not ids:
            raise ValueError(f"RowTokenizer: expected a source with at least one token, got {source!r}; leave it out")
        return ids

    def row(self, example: Example) -> TokenRow:
        """The training row of an example's first target."""
        target = [*self._ids(example.targets[0]), self.tokenizer.eos_token_id]
        return TokenRow(self.source_ids(example.source), target[: self.row_format.max_target_tokens])

    def rows(self, examples: Sequence[Example]) -> list[TokenRow]:
        """The training rows of many examples."""
        return [self.row(example) for example in examples]


def collate_training(rows: Sequence[TokenRow], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right: ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, T], labels -100 off the targets."""
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start, length = len(row.source_ids), len(row)
        input_ids[index, :length] = torch.tensor(row.source_ids + row.target_ids)
        labels[index, start:length] = torch.tensor(row.target_ids)
        attention_mask[index, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def collate_generation(sources: Sequence[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the left, so that every row's next token follows its last: ``input_ids``, ``attention_mask`` [B, T]."""
    width = max(map(len, sources))
    input_ids = torch.full((len(sources), width), pad_token_id)
    attention_mask = torch.zeros(len(sources), width, dtype=torch.long)
    for index, ids in enumerate(sources):
        input_ids[index, width - len(ids) :] = torch.tensor(ids)
        attention_mask[index, width - len(ids) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class BatchOrder:
    """Which rows form batch number n: a pure function of (seed, n), so a position in the data is one integer.

    Every epoch is a new permutation; the last, incomplete batch of an epoch is kept. With ``bucket`` > 0, the rows of
    that many consecutive batches are sorted by length before they are cut into batches, and all batches of the epoch
    shuffled, which removes most of the padding.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, bucket: int = 0) -> None:
        """Keep the rows' lengths; ``bucket`` 0 leaves the order random."""
        if not lengths:
            raise ValueError("BatchOrder: expected at least one row to train on, got none; check the data set")
        if batch_size < 1:
            raise ValueError(f"BatchOrder: expected batch_size >= 1, got {batch_size}; raise it")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.bucket = bucket
        self.batches_per_epoch = -(-len(lengths) // batch_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, number: int) -> list[int]:
        """The row indices of batch ``number``, counted through all epochs."""
        epoch, position = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if not self.bucket:
            return self._cut(order)
        span = self.bucket * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            batches += self._cut(sorted(order[start : start + span], key=lambda index: self.lengths[index]))
        generator.shuffle(batches)
        return batches

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
