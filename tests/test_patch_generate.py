"""Generation with a patched model: every way of decoding, every cache, equal to decoding on from a cached prefix."""

import pytest
import torch
from models_zoo import (
    FAMILIES,
    assert_close,
    cache_with,
    make_batch,
    make_model,
    make_prefix,
    random_states,
    twin,
)
from torch.nn.functional import log_softmax

from prefix_fast.patching import patch

P, NEW = 5, 6
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}


def generate(model, batch, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, **options}
    with torch.no_grad():
        return model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)[
            :, batch.input_ids.shape[1] :
        ]


def reference_generate(model, batch, **options):
    """Tokens of the unpatched model, whose generate begins with the prefix in its cache."""
    states = random_states(model, P)
    beams = options.get("num_beams", 1)
    ids = torch.cat([batch.input_ids.new_full((len(batch.input_ids), P), 3), batch.input_ids], dim=1)
    mask = torch.cat([batch.attention_mask.new_ones(len(ids), P), batch.attention_mask], dim=1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, P)
    torch.manual_seed(options.pop("seed", 0))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, **options}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache_with(*states, len(ids) * beams),
        **options,
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_prefix_in_cache(family, way):
    model, batch = make_model(family), make_batch("left")
    expected = reference_generate(twin(model), batch, **WAYS[way])
    assert torch.equal(generate(patch(model, make_prefix(model, P)), batch, **WAYS[way]), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("static", {"cache_implementation": "static"}),
        ("chunked prefill", {"prefill_chunk_size": 4}),
        ("no cache", {"use_cache": False}),
        ("prompt lookup", {"prompt_lookup_num_tokens": 2}),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_tokens_equal_dynamic_cache(family, name, options):
    model = make_model(family)
    patch(model, make_prefix(model, P))
    batch = make_batch("left") if "lookup" not in name else make_batch("none", rows=1)
    assert torch.equal(generate(model, batch, **options), generate(model, batch))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_assisted_decoding_with_unpatched_draft(family):
    model, draft = make_model(family), make_model(family, seed=1)
    patch(model, make_prefix(model, P))
    batch = make_batch("none", rows=1)
    assert torch.equal(generate(model, batch, assistant_model=draft), generate(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "none"])
def test_token_by_token_equals_one_forward(family, padding):
    model = make_model(family)
    patch(model, make_prefix(model, P))
    batch = make_batch(padding)
    whole = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    cache, steps = None, []
    for end in range(1, batch.input_ids.shape[1] + 1):
        out = model(
            batch.input_ids[:, end - 1 : end], attention_mask=batch.attention_mask[:, :end], past_key_values=cache
        )
        cache = out.past_key_values
        steps.append(out.logits)
    visible = batch.attention_mask.bool()
    assert cache.get_seq_length() == batch.input_ids.shape[1]
    assert_close(torch.cat(steps, dim=1)[visible], whole[visible], 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_static_cache_with_stale_slots(family):
    """What lies in the slots past the current position must not be seen: here NaN."""
    from transformers import StaticCache

    model = make_model(family)
    patch(model, make_prefix(model, P))
    batch = make_batch("none")
    expected = model(batch.input_ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(batch.input_ids, past_key_values=cache)
        for layer in cache.layers:
            layer.keys.fill_(float("nan"))
            layer.values.fill_(float("nan"))
            layer.cumulative_length.zero_()
        first = model(batch.input_ids[:, :5], past_key_values=cache).logits
        rest = model(batch.input_ids[:, 5:], past_key_values=cache).logits
    assert_close(torch.cat([first, rest], dim=1), expected, 1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_window_generation_equals_forwards_without_cache(family, cache):
    model = make_model(family, sliding_window=4)
    patch(model, make_prefix(model, P))
    batch = make_batch("left")
    tokens = generate(model, batch, cache_implementation=cache)
    ids, mask = batch.input_ids, batch.attention_mask
    for step in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        chosen = log_softmax(logits, -1).gather(1, tokens[:, step : step + 1])
        assert (chosen >= log_softmax(logits, -1).max(-1, keepdim=True).values - 1e-4).all()
        ids = torch.cat([ids, tokens[:, step : step + 1]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def test_prefix_is_computed_once_per_generation(monkeypatch):
    from prefix_fast.prefix import Prefix, PrefixConfig

    model, batch = make_model("gpt2"), make_batch("left")
    patch(model, PrefixConfig(num_virtual_tokens=P, encoder_hidden_size=8))
    calls = []
    forward = Prefix.forward
    monkeypatch.setattr(Prefix, "forward", lambda self: calls.append(0) or forward(self))
    first = generate(model, batch)
    assert len(calls) == 1
    with torch.no_grad():
        for parameter in model.prefix.parameters():
            parameter.mul_(3)
    assert not torch.equal(generate(model, batch), first)
    with pytest.raises(ValueError, match="output_attentions"):
        generate(model, batch, output_attentions=True)
    assert model._prefix_fast.states is None


def test_prompt_too_long_for_the_table_raises():
    model, batch = make_model("gpt2", n_positions=16), make_batch("none")
    patch(model, make_prefix(model, P))
    with pytest.raises(ValueError, match="within the model's 16 positions"):
        generate(model, batch)
