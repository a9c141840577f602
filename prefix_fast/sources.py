"""Batches whose rows share sources: each different source once, the targets as rows that name theirs.

    source_ids, source_mask [N, S]   the different sources, padded on the right
    target_ids, target_mask [B, T]   the targets in the features' order
    source_index [B]                 row b continues source source_index[b]
    labels [B, 1 + T]                of the source's last token, which is never a label, and of the target's

Label j is predicted from the token before, as in transformers: the first target token from the source's last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class SharedSourceCollator:
    """Makes a batch of features whose equal sources are computed once; `patched_model(**batch)` takes it.

    A feature is {"source_ids": [...], "target_ids": [...]}, with a PrefixBank also "prefix_id": a name, a position in
    `bank.names` or None. Features share a source when `source_ids` and `prefix_id` are equal, in whatever order they
    come. With transformers' Trainer set remove_unused_columns=False, or it takes the features' columns away.

    Attributes:
        pad_token_id: fills up shorter sources and targets; any token, it is never read.
    """

    pad_token_id: int

    def __post_init__(self) -> None:
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int):
            raise TypeError(
                f"SharedSourceCollator: expected pad_token_id to be an integer, got {self.pad_token_id!r}; any token of"
                " the model will do, such as the tokenizer's eos_token_id"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of the features.

        Returns:
            The tensors named at the top of this module, and `prefix_ids` for each row if the features have "prefix_id".

        Raises:
            ValueError: no features, a feature without a source or a target, or only some with a "prefix_id".
        """
        if not features:
            raise ValueError("SharedSourceCollator: expected features, got none")
        sources: dict[tuple[Any, tuple[int, ...]], int] = {}
        index, targets = [], []
        for number, feature in enumerate(features):
            source, target = (_tokens(feature, name, number) for name in ("source_ids", "target_ids"))
            targets.append(target)
            index.append(sources.setdefault((feature.get("prefix_id"), source), len(sources)))
        source_ids, source_mask = self._padded([source for _, source in sources])
        target_ids, target_mask = self._padded(targets)
        labels = torch.nn.functional.pad(target_ids.masked_fill(~target_mask, IGNORED), (1, 0), value=IGNORED)
        batch: dict[str, Any] = {
            "target_ids": target_ids,
            "target_mask": target_mask,
            "labels": labels,
            "source_ids": source_ids,
            "source_mask": source_mask,
            "source_index": torch.tensor(index),
        }
        chosen = [feature["prefix_id"] for feature in features if "prefix_id" in feature]
        if chosen and len(chosen) < len(features):
            raise ValueError(
                f"SharedSourceCollator: expected prefix_id in all features or in none, got it in {len(chosen)} of"
                f" {len(features)}; None stands for no prefix"
            )
        if chosen:
            batch["prefix_ids"] = torch.tensor(chosen) if all(type(name) is int for name in chosen) else chosen
        return batch

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """The rows as one tensor, and where they are."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad_token_id] * (width - len(row))] for row in rows])
        return ids, torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)


def _tokens(feature: Any, name: str, number: int) -> tuple[int, ...]:
    """The feature's tokens of this name."""
    if not isinstance(feature, Mapping) or name not in feature:
        came = sorted(feature) if isinstance(feature, Mapping) else type(feature).__name__
        raise ValueError(
            f"SharedSourceCollator: expected features with source_ids and target_ids, got {came} in feature {number};"
            " with transformers' Trainer set remove_unused_columns=False"
        )
    given = feature[name]
    ids = given.tolist() if hasattr(given, "tolist") else list(given)
    if not ids or not all(isinstance(token, int) for token in ids):
        raise ValueError(
            f"SharedSourceCollator: expected {name} to be a list of one token or more, got {ids} in feature {number}"
        )
    return tuple(ids)
