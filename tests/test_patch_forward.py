"""A patched model against transformers' own cache that holds the prefix: logits, losses, gradients, masks."""

import pytest
import torch
from models_zoo import (
    FAMILIES,
    WITH_EXTRAS,
    assert_close,
    cache_with,
    make_batch,
    make_model,
    make_prefix,
    random_states,
    twin,
    with_prefix_mask,
)

from prefix_fast.patching import patch, unpatch

P = 5


def reference_run(model, batch, length=P, dtype=torch.float32, **arguments):
    """Logits, loss and prefix gradients of the unpatched model with the prefix in its cache, as PEFT puts it there."""
    keys, values = (tensor.requires_grad_() for tensor in random_states(model, length))
    cache = cache_with(keys, values, len(batch.input_ids), dtype)
    given = {**batch.arguments(), "attention_mask": with_prefix_mask(batch.attention_mask, length), **arguments}
    out = model.train()(past_key_values=cache, use_cache=True, **given)
    out.loss.backward()
    return out.logits[batch.computed()], out.loss, keys.grad, values.grad


def patched_run(model, batch, **arguments):
    out = model.train()(**{**batch.arguments(), **arguments})
    out.loss.backward()
    site = model.prefix.sites["decoder"]
    return out.logits[batch.computed()], out.loss, site.keys.grad, site.values.grad


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_equals_prefix_in_cache(family, padding):
    model, batch = make_model(family), make_batch(padding)
    expected = reference_run(twin(model), batch)
    found = patched_run(patch(model, make_prefix(model, P)), batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_loss_equals_fused(family):
    model, batch = make_model(family), make_batch("left")
    fused = patched_run(patch(twin(model), make_prefix(model, P)), batch)
    plain = patched_run(patch(model, make_prefix(model, P), fused_loss=False), batch)
    for ours, theirs in zip(fused, plain, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("family", WITH_EXTRAS)
def test_short_row_with_window_softcap_sinks_equals_prefix_in_cache(family):
    """Rows shorter than the window, where the prefix that is always visible and the one in the window are the same."""
    model, batch = make_model(family, sliding_window=32), make_batch("left")
    reference = twin(model)
    reference.set_attn_implementation("eager")
    expected = reference_run(reference, batch)
    found = patched_run(patch(model, make_prefix(model, P)), batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_window_leaves_prefix_visible(family):
    """The own tokens obey the window, the prefix does not: the same numbers from a mask that says so."""
    model, batch = make_model(family, sliding_window=4), make_batch("none", tokens=11)
    reference, rows = twin(model), len(batch.input_ids)
    reference.set_attn_implementation("eager")
    query, key = torch.arange(11)[:, None], torch.arange(11)[None]
    allowed = {"full_attention": key <= query, "sliding_attention": (key <= query) & (key > query - 4)}
    masks = {}
    for kind, mask in allowed.items():
        mask = torch.cat([torch.ones(11, P, dtype=torch.bool), mask], dim=1)
        masks[kind] = torch.zeros(mask.shape).masked_fill(~mask, -1e30).expand(rows, 1, -1, -1)
    mask = masks["sliding_attention"] if family == "mistral" else masks
    keys, values = random_states(model, P)
    positions = torch.arange(P, P + 11)[None]
    expected = reference(
        batch.input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache_with(keys, values, rows)
    ).logits
    assert_close(patch(model, make_prefix(model, P))(batch.input_ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_model_with_float32_prefix_is_as_exact_as_transformers(family):
    batch, half = make_batch("left"), torch.bfloat16
    truth = reference_run(make_model(family), batch)
    theirs = reference_run(make_model(family, dtype=half), batch, dtype=half)
    model = make_model(family, dtype=half)
    ours = patched_run(patch(model, make_prefix(model, P)), batch)
    assert ours[0].dtype == half and all(gradient.dtype == torch.float32 for gradient in ours[2:])
    for found, rival, exact in zip(ours, theirs, truth, strict=True):
        error, allowed = ((tensor.float() - exact).abs().max() for tensor in (found, rival))
        assert error <= 2 * allowed + 0.02 * exact.abs().max()


def test_compute_dtype_runs_under_autocast(any_half):
    model, batch = make_model("llama"), make_batch("left")
    expected = reference_run(twin(model), batch)
    logits, loss, *gradients = patched_run(patch(model, make_prefix(model, P), compute_dtype=torch.bfloat16), batch)
    assert logits.dtype == torch.bfloat16
    assert_close(loss, expected[1], 0.02)
    for ours, theirs in zip(gradients, expected[2:], strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_positions_are_shifted(family):
    model, batch = make_model(family), make_batch("none")
    positions = torch.arange(9).flip(0)[None] + 3
    expected = reference_run(twin(model), batch, position_ids=positions + P)
    found = patched_run(patch(model, make_prefix(model, P)), batch, position_ids=positions)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positional_arguments_and_embeddings_equal_keywords(family):
    model, batch = make_model(family), make_batch("left")
    patch(model, make_prefix(model, P))
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    second = {"gpt2": (None, batch.attention_mask), "llama": (batch.attention_mask,)}[family]
    assert torch.equal(model(batch.input_ids, *second).logits, expected)
    embeddings = model.get_input_embeddings()(batch.input_ids)
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=batch.attention_mask).logits, expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_four_dimensional_mask(kind):
    model, batch = make_model("llama"), make_batch("none")
    patch(model, make_prefix(model, P))
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)
    assert_close(model(batch.input_ids, attention_mask=mask).logits, model(batch.input_ids).logits, 1e-5)


def test_texts_packed_in_one_row_equal_rows_of_their_own():
    """Positions that restart mark several texts in a row; each sees the prefix, none sees another text."""
    model = make_model("llama")
    patch(model, make_prefix(model, P))
    batch = make_batch("none", rows=1, tokens=10)
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    packed = model(batch.input_ids, position_ids=positions, use_cache=False).logits
    apart = [model(batch.input_ids[:, part]).logits for part in (slice(0, 6), slice(6, 10))]
    assert_close(packed, torch.cat(apart, dim=1), 1e-5)


def test_no_virtual_tokens_is_the_plain_model():
    model, batch = make_model("gpt2"), make_batch("left")
    expected = twin(model)(batch.input_ids, attention_mask=batch.attention_mask).logits
    patch(model, 0)
    assert model.prefix is None and not any(parameter.requires_grad for parameter in model.parameters())
    visible = batch.attention_mask.bool()
    found = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert_close(found[visible], expected[visible], 1e-5)
    unpatch(model)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_beyond_the_table_raise(family):
    name = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[family]
    model, batch = make_model(family, **{name: 12}), make_batch("none", tokens=9)
    patch(model, make_prefix(model, 3))
    model(batch.input_ids)
    with pytest.raises(ValueError, match="within the model's 12 positions, got position 12; shorten the prefix"):
        model(batch.input_ids, position_ids=torch.arange(1, 10)[None])
    patch(model, make_prefix(model, 4))
    with pytest.raises(ValueError, match="within the model's 12 positions, got position 12; shorten the prefix"):
        model(batch.input_ids)


@pytest.mark.parametrize("task", ["base", "sequence-classification"])
def test_other_heads_read_the_prefix(task):
    from transformers import AutoModel, AutoModelForSequenceClassification

    batch = make_batch("left")
    config = make_model("llama").config
    classes = {"base": AutoModel, "sequence-classification": AutoModelForSequenceClassification}
    model = classes[task].from_config(config).eval()
    keys, values = random_states(model, P)
    arguments = {"input_ids": batch.input_ids, "attention_mask": with_prefix_mask(batch.attention_mask, P)}
    expected = twin(model)(past_key_values=cache_with(keys, values, 3), **arguments)[0]
    found = patch(model, make_prefix(model, P))(batch.input_ids, attention_mask=batch.attention_mask)[0]
    assert_close(found, expected)


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unmasked"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoders_equal_prefix_in_cache(family, masked):
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(family, **sizes, intermediate_size=48, initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    batch = make_batch("right" if masked else "none")
    keys, values = random_states(model, P)
    with_cache = {"attention_mask": with_prefix_mask(batch.attention_mask, P)} if masked else {}
    cache = cache_with(keys, values, len(batch.input_ids))
    expected = twin(model)(batch.input_ids, past_key_values=cache, **with_cache)
    patch(model, make_prefix(model, P))
    found = model(batch.input_ids, **({"attention_mask": batch.attention_mask} if masked else {}))
    real = batch.attention_mask.bool()
    assert_close(found.last_hidden_state[real], expected.last_hidden_state[real])
    assert_close(found.pooler_output, expected.pooler_output)
