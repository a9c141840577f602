"""Generation with a patched encoder-decoder: the tokens of an eager one with the prefix inside its keys and values."""

import pytest
import torch
from models_zoo import twin
from seq2seq_zoo import FAMILIES, attentions, make_seq2seq, make_seq2seq_batch, make_site_prefix, reference

from prefix_fast.patching import patch

P = 4
WAYS = {
    "greedy": {},
    "beam": {"num_beams": 3, "length_penalty": 0.7},
    "sample": {"do_sample": True, "num_beams": 1, "top_k": 20},
}


def tokens(model, padding="left", **arguments):
    torch.manual_seed(0)
    batch = make_seq2seq_batch(padding)
    # Random models repeat themselves; without that, each token is a choice.
    options = {"max_new_tokens": 9, "min_new_tokens": 6, "no_repeat_ngram_size": 1, "do_sample": False, **arguments}
    return model.generate(**batch.source(), **options)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_concatenation(family, way, padding):
    model = make_seq2seq(family)
    prefix = make_site_prefix(model, P)
    expected = tokens(reference(twin(model), twin(prefix)), padding, **WAYS[way])
    found = tokens(patch(model, prefix), padding, **WAYS[way])
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 3
    assert model._prefix_fast.states is None


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_prefix_changes_the_tokens(family):
    """The equalities above would hold for a prefix that nothing reads, if the reference's were not read either."""
    model = make_seq2seq(family)
    plain = tokens(twin(model))
    patched = tokens(patch(model, make_site_prefix(model, P)))
    assert not torch.equal(patched, plain)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_cache_equals_no_cache(family):
    model = make_seq2seq(family)
    patch(model, make_site_prefix(model, P))
    for way in ("greedy", "beam"):
        assert torch.equal(tokens(model, **WAYS[way]), tokens(model, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_static_cache_equals_dynamic(family):
    model = make_seq2seq(family)
    patch(model, make_site_prefix(model, P))
    model.generation_config.disable_compile = True
    assert torch.equal(tokens(model, cache_implementation="static"), tokens(model))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_runs_once_and_no_attention_sees_more_than_its_own_tokens(family):
    """Neither the encoder's nor the prefix's keys are copied: 3 rows of 4 beams read one prefix [1, Hkv, P, D]."""
    model = make_seq2seq(family)
    patch(model, make_site_prefix(model, P))
    runs, lengths, prefixes = [], set(), []
    model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    from prefix_fast.models import hub

    def watched(query, key, value, segments, **rest):
        lengths.add((tuple(key.shape[::2]), query.shape[0]))
        prefixes.extend((segment.key.data_ptr(), segment.key.shape) for segment in segments)
        return original(query, key, value, segments, **rest)

    original, hub.segment_attention = hub.segment_attention, watched
    try:
        tokens(model, num_beams=4)
    finally:
        hub.segment_attention = original
    assert len(runs) == 1
    sites = attentions(model)
    assert len(set(prefixes)) == sum(len(modules) for modules in sites.values())
    assert all(shape[0] == 1 and shape[2] == P for _, shape in prefixes)
    assert ((12, 7), 12) in lengths and max(rows for (rows, _), _ in lengths) == 12


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_outputs_given_to_generate(family):
    model, batch = make_seq2seq(family), make_seq2seq_batch("left")
    patch(model, make_site_prefix(model, P))
    expected = tokens(model)
    with torch.no_grad():
        states = model.get_encoder()(**batch.source())
    options = {"max_new_tokens": 9, "min_new_tokens": 6, "no_repeat_ngram_size": 1, "do_sample": False}
    found = model.generate(encoder_outputs=states, attention_mask=batch.attention_mask, **options)
    assert torch.equal(found, expected)


def test_positions_beyond_the_decoders_table_raise():
    model = make_seq2seq("bart", max_position_embeddings=12)
    patch(model, make_site_prefix(model, 6))
    batch = make_seq2seq_batch("none", source=12, target=6)
    model(**batch.arguments())
    with pytest.raises(ValueError, match="within the model's 12 positions, got position 12; shorten the prefix"):
        model(**make_seq2seq_batch("none", target=7).arguments())


def test_assisted_decoding_with_an_unpatched_draft():
    model, draft = make_seq2seq("bart"), make_seq2seq("bart", seed=1)
    patch(model, make_site_prefix(model, P))
    source = make_seq2seq_batch("none", rows=1).source()
    options = {"max_new_tokens": 9, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**source, **options)
    assert torch.equal(model.generate(**source, assistant_model=draft, **options), expected)
