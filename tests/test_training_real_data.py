"""The real data sets and tokenizers, where PREFIX_FAST_DATA names a folder that has them."""

import pytest

from prefix_fast.training.collate import RowFormat, RowTokenizer, collate_training
from prefix_fast.training.data import load_data


@pytest.mark.parametrize(("name", "train", "test"), [("e2e", 42_061, 630), ("scitldr", 1_992, 618)])
def test_real_set_has_its_published_size(data_dir, name, train, test):
    data = load_data(name, data_dir=data_dir)
    assert len(data.train) == train
    assert len(data.test) == test
    assert all(example.source and all(example.targets) for example in data.test)
    assert max(len(example.targets) for example in data.test) > 1  # all references of a source are one example's


def test_labels_cover_the_targets_of_real_text_and_nothing_else(data_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "gpt2_tokenizer")
    rows = RowTokenizer(tokenizer, RowFormat())
    examples = load_data("e2e", data_dir=data_dir).train[:8]
    batch = collate_training(rows.rows(examples), tokenizer.eos_token_id)
    for labels, example in zip(batch["labels"], examples, strict=True):
        text = tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        assert text.strip() == example.targets[0].strip()
