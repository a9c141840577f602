"""The collator, and batches and models that shared sources do not fit."""

import pytest
import torch
from models_zoo import make_model, make_prefix
from shared_batches import make_features, ordinary, shared

import prefix_fast
from prefix_fast import PrefixBank, SharedSourceCollator
from prefix_fast.patching import patch


def patched():
    return patch(make_model("llama"), 5).train()


def test_collator_keeps_the_features_order():
    features = make_features()
    batch = shared(features)
    assert batch["source_ids"].shape[0] == 3
    for row, feature in enumerate(features):
        source = batch["source_index"][row]
        assert batch["source_ids"][source][batch["source_mask"][source]].tolist() == feature["source_ids"]
        assert batch["target_ids"][row][batch["target_mask"][row]].tolist() == feature["target_ids"]
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == feature["target_ids"]


def test_collator_takes_tensors():
    features = make_features()
    tensors = [{name: torch.tensor(ids) for name, ids in feature.items()} for feature in features]
    for name, expected in shared(features).items():
        assert torch.equal(shared(tensors)[name], expected)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "expected features, got none"),
        ([{"source_ids": [5], "target_ids": []}], "expected target_ids.* got \\[\\] in feature 0"),
        ([{"source_ids": [], "target_ids": [5]}], "expected source_ids.* got \\[\\] in feature 0"),
        ([{"source_ids": [5], "target_ids": [5]}, {"input_ids": [5]}], "'input_ids'.* in feature 1.*remove_unused"),
        ([{"source_ids": [5], "target_ids": [[5]]}], "expected target_ids"),
        ([{"source_ids": [5], "target_ids": [5], "prefix_id": "a"}, {"source_ids": [5], "target_ids": [5]}], "1 of 2"),
    ],
)
def test_features_that_do_not_fit(features, message):
    with pytest.raises(ValueError, match=message):
        shared(features)


def test_padding_token_that_is_none():
    with pytest.raises(TypeError, match="got None"):
        SharedSourceCollator(pad_token_id=None)


def changed(**changes):
    batch = shared(make_features())
    batch.update({name: change(batch[name]) for name, change in changes.items()})
    return {name: value for name, value in batch.items() if value is not None}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda: changed(source_index=lambda x: x + 1), "one of the batch's 3 sources, 0 to 2, got \\[3"),
        (lambda: changed(source_index=lambda x: x - 1), "got \\[-1"),
        (lambda: changed(source_index=lambda x: None), "without \\['source_index'\\]"),
        (lambda: changed(target_ids=lambda x: x[:0], target_mask=lambda x: x[:0]), "expected target_ids of shape"),
        (lambda: changed(target_mask=lambda x: x & False), "got none in target_mask of rows \\[0, 1"),
        (lambda: changed(source_mask=lambda x: x & False), "got none in source_mask of rows \\[0, 1"),
        (lambda: changed(labels=lambda x: x[:, 1:]), "expected labels of shape"),
        (lambda: changed(labels=lambda x: None), "expected labels or per_token_logps"),
        (lambda: changed(source_ids=lambda x: x.to("meta")), "'source_ids': 'meta'"),
        (lambda: {**shared(make_features()), "input_ids": torch.ones(7, 3)}, "with \\['input_ids'\\]"),
        (lambda: {**ordinary(make_features()), "per_token_logps": True}, "without \\['source_ids'"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(ValueError, match=message):
        patched()(**batch())


def test_source_under_several_prefixes():
    model = make_model("llama")
    patch(model, PrefixBank({"a": make_prefix(model, 3), "b": make_prefix(model, 4)}))
    batch = shared(make_features((2,)))
    for chosen in (["a", "b"], torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="one prefix for all rows of a source"):
            model(**batch, prefix_ids=chosen)
    with pytest.raises(ValueError, match="expected prefix_ids"):
        model(**batch, prefix_ids=["a"])
    with pytest.raises(ValueError, match="expected prefix_ids"):
        model(**batch)


def test_models_that_are_refused():
    batch = shared(make_features())
    model = patched()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(NotImplementedError, match="whose loss is"):
        model(**batch)
    model = patch(make_model("gpt_oss", sliding_window=64, output_router_logits=True), 5)
    with pytest.raises(NotImplementedError, match="router"):
        model(**batch)


def test_prefix_and_tokens_past_the_positions():
    model = patch(make_model("gpt2", n_positions=12), 5)
    with pytest.raises(ValueError, match="12 positions"):
        model(**shared(make_features()))


def test_public_name():
    assert prefix_fast.SharedSourceCollator is SharedSourceCollator
