"""Pairs that share sources, as batches with shared sources and as ordinary ones."""

import torch
from models_zoo import VOCAB

from prefix_fast import SharedSourceCollator

PAD = 2


def make_features(groups=(2, 1, 4), seed=0, shuffled=True):
    """Pairs with sources and targets of different lengths, of which groups of so many share a source."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    features = []
    for rows in groups:
        source = tokens(11)
        features += [{"source_ids": source, "target_ids": tokens(7)} for _ in range(rows)]
    order = torch.randperm(len(features), generator=generator).tolist() if shuffled else range(len(features))
    return [features[number] for number in order]


def ordinary(features):
    """The same pairs as rows of source and target, padded on the right; labels on the targets."""
    rows = [feature["source_ids"] + feature["target_ids"] for feature in features]
    width = max(map(len, rows))
    labels = [[-100] * len(feature["source_ids"]) + feature["target_ids"] for feature in features]
    return {
        "input_ids": torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    }


def shared(features):
    return SharedSourceCollator(pad_token_id=PAD)(features)


def source_to_target(features):
    """The same pairs as an ordinary batch of an encoder-decoder."""
    widths = [max(len(feature[name]) for feature in features) for name in ("source_ids", "target_ids")]
    sources, targets = (
        [feature[name] + [fill] * (width - len(feature[name])) for feature in features]
        for name, fill, width in zip(("source_ids", "target_ids"), (PAD, -100), widths, strict=True)
    )
    ids = torch.tensor(sources)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(targets)}
