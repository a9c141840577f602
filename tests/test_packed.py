"""Padded and flattened batches are computed without padding: the numbers of the same model that computes all of it."""

import pytest
import torch
from models_zoo import FAMILIES, WITH_EXTRAS, assert_close, make_batch, make_model, make_peft, make_prefix, twin

from prefix_fast import PrefixBank, PrefixConfig, patch, unpatch
from prefix_fast.models import packed
from prefix_fast.models.loss import loss_plan

P = 5


@pytest.fixture
def packings(monkeypatch):
    """The rows of every batch that was packed; a call that was not adds None."""
    found, function = [], packed.padding_free
    monkeypatch.setattr(packed, "padding_free", lambda *args: found.append(function(*args)) or found[-1])
    return found


def step(model, arguments):
    """Loss, logits and the prefix's gradients of one call."""
    model.zero_grad()
    out = model.train()(**arguments)
    out.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return out, [out.loss, *gradients]


def assert_same_step(model, other, batch, **arguments):
    given = {**batch.arguments(), **arguments}
    (ours, found), (theirs, expected) = step(model, given), step(other, given)
    for ours_part, theirs_part in zip(found, expected, strict=True):
        assert_close(ours_part, theirs_part, 1e-5)
    assert_close(ours.logits[batch.computed()], theirs.logits[batch.computed()], 1e-5)
    assert ours.logits.shape == theirs.logits.shape


def both(model, prefix):
    return patch(twin(model), prefix), patch(model, twin(prefix), padding_free=False)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("family", [*FAMILIES, *WITH_EXTRAS])
def test_step_equals_the_one_that_computes_padding(family, padding, packings):
    model, batch = make_model(family), make_batch(padding)
    assert_same_step(*both(model, make_prefix(model, P)), batch, use_cache=False)
    if loss_plan(type(make_model(family))) is None:  # GPT-OSS's loss has a term of its router
        assert packings == []
    else:
        (rows,) = packings
        assert rows.index.numel() == batch.computed().sum() and rows.last is not None


@pytest.mark.parametrize("given", ["inputs_embeds", "position_ids", "token_type_ids"])
def test_whatever_is_given_for_each_token_is_packed(given, packings):
    model, batch = make_model("gpt2"), make_batch("left")
    ours, theirs = both(model, make_prefix(model, P))
    extra = {
        "inputs_embeds": lambda: {"input_ids": None, given: ours.get_input_embeddings()(batch.input_ids).detach()},
        "position_ids": lambda: {given: torch.arange(9).flip(0)[None] + 3},
        "token_type_ids": lambda: {given: batch.input_ids.flip(1)},
    }[given]()
    assert_same_step(ours, theirs, batch, **extra)
    assert packings[0] is not None


def test_layers_see_computed_positions_alone():
    model, batch = patch(make_model("llama"), P), make_batch("left")
    counts = tokens_of_each_layer(model)
    model.train()(**batch.arguments())
    assert counts == [int(batch.computed().sum()), needed(batch)]
    assert needed(batch) < counts[0] < batch.input_ids.numel()
    model.eval()(**batch.arguments())
    assert counts[2:] == [batch.input_ids.numel()] * 2


def tokens_of_each_layer(model):
    """How many tokens each MLP of a Llama has computed, call by call."""
    counts = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: counts.append(args[0].shape[:-1].numel()))
    return counts


def needed(batch):
    """The tokens between a row's first label and its last one."""
    places = [row.nonzero()[:, 0] for row in batch.labels[:, 1:] != -100]
    return sum(int(row[-1] - row[0]) + 1 for row in places if len(row))


@pytest.mark.parametrize("labels", ["end", "middle", "two-runs", "one", "some-rows"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_last_layer_computes_what_labels_need(family, labels, packings):
    model, batch = make_model(family), make_batch("right", tokens=12)
    chosen = torch.full_like(batch.labels, -100)
    parts = {
        "end": [slice(6, 12)],
        "middle": [slice(4, 6)],
        "two-runs": [slice(1, 3), slice(6, 8)],
        "one": [slice(3, 4)],
    }
    for part in parts.get(labels, [slice(5, 8)]):
        chosen[:, part] = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, part]
    if labels == "some-rows":
        chosen[1] = -100
    changed = batch._replace(labels=chosen)
    assert_same_step(*both(model, make_prefix(model, P)), changed, use_cache=False)
    last = packings[0].last
    assert len(last.needed) == needed(changed)
    assert sorted([*last.needed.tolist(), *last.rest.tolist()]) == list(range(len(packings[0].index)))


def test_last_layer_is_computed_whole_where_asked_for():
    model, batch = patch(make_model("llama"), P, trim_last_layer=False).train(), make_batch("left")
    counts = tokens_of_each_layer(model)
    model(**batch.arguments())
    assert counts == [int(batch.computed().sum())] * 2


def test_reading_logits_computes_the_last_layer_from_then_on():
    model, batch = patch(make_model("llama", attention_dropout=0.2), P).train(), make_batch("left")
    counts, computed = tokens_of_each_layer(model), int(batch.computed().sum())
    out = model(**batch.arguments())
    generator = torch.get_rng_state()
    logits = out.logits
    assert torch.equal(torch.get_rng_state(), generator)
    assert counts == [computed, needed(batch), computed, computed]
    assert logits is out.logits and (logits[batch.computed()] != 0).any(-1).all()
    model(**batch.arguments())
    assert counts[4:] == [computed] * 2


def test_unpatched_last_layer_is_its_own_class_again():
    model = make_model("gpt2")
    own = type(model.transformer.h[-1])
    assert type(patch(model, P).transformer.h[-1]) is not own
    assert type(unpatch(model).transformer.h[-1]) is own


def test_logits_of_left_out_positions_are_those_of_zeros():
    model, batch = patch(make_model("gpt2"), P).train(), make_batch("right")
    logits = model(**batch.arguments()).logits
    assert (logits[~batch.computed()] == 0).all() and (logits[batch.computed()] != 0).any(-1).all()


def test_returned_cache_is_that_of_the_padded_batch():
    model, batch = make_model("llama"), make_batch("left")
    ours, theirs = (each.train()(**batch.arguments()) for each in both(model, make_prefix(model, P)))
    seen = batch.attention_mask.bool()
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for found, expected in ((mine.keys, other.keys), (mine.values, other.values)):
            assert found.shape == expected.shape
            assert_close(found.transpose(1, 2)[seen], expected.transpose(1, 2)[seen], 1e-5)


def test_rows_of_a_bank_keep_their_prefix(packings):
    model, batch = make_model("llama"), make_batch("left")
    bank = PrefixBank({"a": make_prefix(model, 3), "b": make_prefix(model, 7, seed=2)})
    assert_same_step(*both(model, bank), batch, prefix_ids=["b", None, "a"])
    assert packings[0] is not None


def test_peft_model_trains_without_padding(packings):
    batch = make_batch("left")
    model = make_peft("llama")
    assert_same_step(patch(twin(model)), model, batch)
    assert packings[0] is not None


def test_window_of_a_peft_model_counts_padding(packings):
    """Its window holds prefix positions, which padding on the left moves away."""
    model, batch = make_peft("mistral"), make_batch("left")
    ours, theirs = patch(twin(model)), patch(model, padding_free=False)
    for _ in range(2):
        assert_same_step(ours, theirs, batch, use_cache=False)
    assert packings[0] is not None and len(packings) == 1  # refused by the first layer, and not tried again


@pytest.mark.parametrize("change", ["gap", "label-in-right-padding", "all-labelled", "four-dimensional"])
def test_what_cannot_be_left_out_is_computed(change, packings):
    model, batch = make_model("llama"), make_batch("none" if change == "gap" else "right")
    mask, labels = batch.attention_mask.clone(), batch.labels.clone()
    if change == "gap":
        mask[1, 4] = 0
    elif change == "label-in-right-padding":
        labels[2, -1] = 7
    elif change == "all-labelled":
        labels = batch.input_ids
    else:
        allowed = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()[:, None, None]
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)
    changed = batch._replace(labels=labels)
    (ours, found), (theirs, expected) = (
        step(each, {**changed.arguments(), "attention_mask": mask}) for each in both(model, make_prefix(model, P))
    )
    for mine, other in zip([*found, ours.logits], [*expected, theirs.logits], strict=True):
        assert_close(mine, other, 1e-5)
    assert packings == [None]


def test_row_of_padding_alone(packings):
    model, batch = make_model("llama"), make_batch("left")
    mask, labels = batch.attention_mask.clone(), batch.labels.clone()
    mask[1] = 0
    labels[1] = -100
    changed = batch._replace(attention_mask=mask, labels=labels)
    assert_same_step(*both(model, make_prefix(model, P)), changed)
    assert packings[0] is not None


def test_checkpointed_step_is_the_same(packings):
    model, batch = make_model("gpt2"), make_batch("left")
    ours, theirs = both(model, make_prefix(model, P))
    ours.activation_checkpointing_enable()
    assert_same_step(ours, theirs, batch, use_cache=False)
    assert packings[0] is not None


def test_half_precision_step_is_as_exact(packings):
    batch, half = make_batch("left"), torch.bfloat16
    truth = step(patch(make_model("llama"), make_prefix(make_model("llama"), P)), batch.arguments())[1]
    model = make_model("llama", dtype=half)
    ours, theirs = (step(each, batch.arguments())[1] for each in both(model, make_prefix(model, P)))
    for found, rival, exact in zip(ours, theirs, truth, strict=True):
        error, allowed = ((tensor.float() - exact).abs().max() for tensor in (found, rival))
        assert error <= 2 * allowed + 0.02 * exact.abs().max()


def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = (6, 1, 9, 4)
    return [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture
def contexts(monkeypatch):
    """The number of attention calls among packed rows."""
    calls, function = [], packed.segment_attention
    monkeypatch.setattr(packed, "segment_attention", lambda *args, **kw: calls.append(1) or function(*args, **kw))
    return calls


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2"])
def test_flattened_batch_equals_rows(family, options, contexts):
    from transformers import DataCollatorWithFlattening

    model = make_model(family)
    model = patch(model, make_prefix(model, P), padding_free=True)
    batch = dict(DataCollatorWithFlattening(**options)([{"input_ids": text} for text in texts()]))
    _, expected = step(model, {**padded(texts()), "use_cache": False})
    contexts.clear()
    out, found = step(model, {**batch, "use_cache": False})
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-5)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert len(contexts) == model.config.num_hidden_layers
    with torch.no_grad():
        assert_close(model.eval()(**batch, use_cache=False).logits, out.logits, 1e-5)


def test_flattened_batch_without_packed_rows_equals_rows(contexts):
    from transformers import DataCollatorWithFlattening

    model = make_model("llama")
    ours, theirs = both(model, make_prefix(model, P))
    batch = dict(DataCollatorWithFlattening()([{"input_ids": text} for text in texts()]), use_cache=False)
    for found, expected in zip(step(ours, batch)[1], step(theirs, batch)[1], strict=True):
        assert_close(found, expected, 1e-5)
    assert len(contexts) == model.config.num_hidden_layers


def test_flattened_texts_read_the_rows_entry_of_a_bank():
    model = make_model("llama")
    bank = PrefixBank({"a": make_prefix(model, 3), "b": make_prefix(model, 7, seed=2)})
    plain = patch(twin(model), twin(bank["b"]))
    patch(model, bank)
    ids = torch.cat([torch.tensor(text) for text in texts()])[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts()])[None]
    found = model(input_ids=ids, position_ids=positions, prefix_ids=["b"]).logits
    assert_close(found, plain(input_ids=ids, position_ids=positions).logits, 1e-5)


def test_offsets_that_do_not_end_with_the_tokens_raise():
    model = patch(make_model("llama"), PrefixConfig(num_virtual_tokens=3))
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="expected offsets up to the row's 4 tokens, got 3"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 2, 3]), max_length_q=2)
