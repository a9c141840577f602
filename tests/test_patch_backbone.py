"""The backbone of a patched model, called by itself as trainers with a head of their own do, reads the prefix."""

import copy
import pickle

import pytest
import torch
from models_zoo import FAMILIES, assert_close, make_batch, make_model, make_peft, make_prefix

from prefix_fast import PrefixBank, patch, unpatch

P = 5


def inputs(batch):
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def head_of(model, hidden):
    return model.get_output_embeddings()(hidden)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_and_head_are_the_model(family, padding):
    model, batch = make_model(family), make_batch(padding)
    patch(model, make_prefix(model, P))
    expected = model(**inputs(batch)).logits
    hidden = model.base_model(**inputs(batch)).last_hidden_state
    assert torch.equal(head_of(model, hidden), expected)
    assert torch.equal(model.base_model(batch.input_ids, attention_mask=batch.attention_mask)[0], hidden)
    hidden.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.prefix.parameters())


def test_backbone_of_a_bank_takes_ids():
    model, batch = make_model("llama"), make_batch("left")
    patch(model, PrefixBank({"a": make_prefix(model, 3), "b": make_prefix(model, 7, seed=2)}))
    expected = model(**inputs(batch), prefix_ids=["b", None, "a"]).logits
    hidden = model.base_model(**inputs(batch), prefix_ids=["b", None, "a"]).last_hidden_state
    assert torch.equal(head_of(model, hidden), expected)
    with pytest.raises(ValueError, match="expected prefix_ids"):
        model.base_model(**inputs(batch))


def test_texts_in_one_row_stay_apart():
    model = make_model("llama")
    patch(model, make_prefix(model, P))
    ids, positions = make_batch("none", rows=1, tokens=10).input_ids, torch.tensor([[*range(6), *range(4)]])
    found = model.base_model(ids, position_ids=positions).last_hidden_state
    apart = [model.base_model(ids[:, part]).last_hidden_state for part in (slice(0, 6), slice(6, 10))]
    assert_close(found, torch.cat(apart, 1), 1e-5)


def test_copies_and_pickles_have_their_own_backbone():
    model, batch = make_model("gpt2"), make_batch("left")
    patch(model, make_prefix(model, P))
    expected = model.base_model(**inputs(batch)).last_hidden_state
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.prefix.parameters():
                parameter.add_(1)
        assert torch.equal(copied.base_model(**inputs(batch)).last_hidden_state, expected)


def test_unpatched_backbone_is_its_own_class_again():
    model, batch = make_model("gpt2"), make_batch("left")
    expected, own = model.base_model(**inputs(batch)).last_hidden_state, type(model.base_model)
    unpatch(patch(model, P))
    assert type(model.base_model) is own
    assert torch.equal(model.base_model(**inputs(batch)).last_hidden_state, expected)
    peft = make_peft("gpt2")
    unpatch(patch(peft))
    assert type(peft.base_model.base_model) is own
