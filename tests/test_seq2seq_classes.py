"""Which encoder-decoders take a prefix and give an eager model's numbers, and which are refused, with the reason."""

import pytest
import torch
from models_zoo import assert_close, make_model, twin
from seq2seq_zoo import (
    attentions,
    make_seq2seq,
    make_seq2seq_batch,
    make_site_prefix,
    make_whisper,
    reference,
)

from prefix_fast.models.families import SEQ2SEQ_STYLES
from prefix_fast.patching import patch
from prefix_fast.prefix import Prefix, PrefixConfig

P = 4


def speech(target=5):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 14, generator=generator)
    labels = torch.randint(3, 61, (3, target), generator=generator)
    labels[1, -2:] = -100
    return {"input_features": features, "labels": labels}


def gradients(model, prefix, **batch):
    out = model.train()(**batch)
    out.loss.backward()
    return [out.logits, out.loss, *(parameter.grad for parameter in prefix.parameters())]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_whisper_step_equals_concatenation(fused):
    model = make_whisper()
    prefix = make_site_prefix(model, P)
    theirs = twin(prefix)
    expected = gradients(reference(twin(model), theirs), theirs, **speech())
    patch(model, prefix, fused_loss=fused)
    assert model._prefix_fast.plan is not None
    for ours, truth in zip(gradients(model, prefix, **speech()), expected, strict=True):
        assert_close(ours, truth, 1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_whisper_tokens_equal_concatenation(beams):
    model = make_whisper()
    prefix = make_site_prefix(model, P)
    features = speech()["input_features"]
    model.generation_config.update(max_new_tokens=9, min_new_tokens=6, max_length=None, min_length=None)
    model.generation_config.update(no_repeat_ngram_size=1, num_beams=beams, suppress_tokens=None)
    model.generation_config.begin_suppress_tokens = None
    expected = reference(twin(model), twin(prefix)).generate(features)
    found = patch(model, prefix).generate(features)
    assert torch.equal(found, expected) and len(expected.unique()) > 6


def test_whisper_positions_given_by_the_caller_are_shifted():
    model = make_whisper()
    prefix = make_site_prefix(model, P)
    positions = torch.arange(5)[None] + 7
    expected = reference(twin(model), twin(prefix))(**speech(), decoder_position_ids=positions).logits
    assert_close(patch(model, prefix)(**speech(), decoder_position_ids=positions).logits, expected, 1e-5)


def test_whisper_positions_beyond_the_table_raise():
    model = patch(make_whisper(), 20)
    model(**speech(target=4))
    with pytest.raises(ValueError, match="within the model's 24 positions, got position 24; shorten the prefix"):
        model(**speech(target=5))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bart", "BartModel"), ("bart", "BartForQuestionAnswering"), ("mbart", "MBartModel"), ("t5", "T5Model"),
        ("t5", "T5ForQuestionAnswering"), ("umt5", "UMT5Model"), ("marian", "MarianModel"),
    ],
)  # fmt: skip
def test_other_heads_equal_concatenation(family, name):
    import transformers

    batch = make_seq2seq_batch("left")
    torch.manual_seed(0)
    model = getattr(transformers, name)(make_seq2seq(family).config).eval()
    prefix = make_site_prefix(model, P)
    given = {**batch.source(), "decoder_input_ids": batch.labels.clamp(min=2)}
    expected = reference(twin(model), twin(prefix))(**given)[0]
    assert_close(patch(model, prefix)(**given)[0], expected, 1e-5)


def state_of(model):
    return {
        name: (type(module), set(vars(module)), module.training, getattr(module, "config", None) and (
            module.config._attn_implementation
        ))
        for name, module in model.named_modules()
    }  # fmt: skip


REFUSED = [
    ("bart", "BartForSequenceClassification", "as classifiers of sequences are"),
    ("t5", "T5ForSequenceClassification", "as classifiers of sequences are"),
    ("bart", "BartForCausalLM", "positions can be shifted"),
    ("umt5", "UMT5EncoderModel", "each attention of UMT5EncoderModel once, .* got {'encoder': 3, 'decoder': 0"),
    ("t5", "T5EncoderModel", "positions can be shifted"),
]


@pytest.mark.parametrize(("family", "name", "message"), REFUSED, ids=[name for _, name, _ in REFUSED])
def test_class_without_the_three_attentions_is_refused_and_unchanged(family, name, message):
    import transformers

    model = getattr(transformers, name)(make_seq2seq(family).config).eval()
    before = state_of(model)
    with pytest.raises(NotImplementedError, match=message):
        patch(model, 3)
    assert state_of(model) == before


def test_type_that_no_test_covers_is_refused_and_unchanged():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=61, d_model=32, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4, d_ff=16, num_experts=2
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    before = state_of(model)
    with pytest.raises(NotImplementedError, match="of type 'switch_transformers', for which no test shows"):
        patch(model, 3)
    assert state_of(model) == before


def test_every_admitted_type_is_compared_somewhere():
    from seq2seq_zoo import FAMILIES

    assert set(SEQ2SEQ_STYLES) == ({*FAMILIES} - {"flan-t5"}) | {"whisper"}


def test_attention_that_a_trial_does_not_know_is_refused():
    """A relative bias where positions are embedded, and a layer that hands no keywords down."""
    model = make_seq2seq("t5")
    before = state_of(model)
    model.config.model_type = "bart"
    with pytest.raises(NotImplementedError, match="decoder whose embed_positions takes past_key_values_length"):
        patch(model, 3)
    assert state_of(model) == before
    model = make_seq2seq("bart")
    layer = attentions(model)["decoder"][1]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {name: kwargs[name] for name in kwargs if name != "prefix_fast"}),
        with_kwargs=True,
    )
    with pytest.raises(NotImplementedError, match=r"each attention of Bart.* once, .* got .*'decoder': 1"):
        patch(model, 3)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        ("bart", {"prefix": PrefixConfig(3, sites=("cross", "decoder")), "backend": "tpu"}, ValueError, "got 'tpu'"),
        ("t5", {"freeze": False}, NotImplementedError, "freeze=True, got False with T5For.* position bias"),
    ],
)
def test_bad_arguments(make, arguments, error, message):
    model = make_seq2seq(make)
    before = state_of(model)
    with pytest.raises(error, match=message):
        patch(model, **arguments)
    assert state_of(model) == before


def test_prefix_of_another_model_names_site_and_sizes():
    bart = make_seq2seq("bart")
    for other, message in (
        (make_seq2seq("bart", encoder_layers=4), "num_layers=3 at the site 'encoder', got one with num_layers=4"),
        (make_seq2seq("bart", decoder_attention_heads=4), "num_kv_heads=2, head_dim=16, got one with num_kv_heads=4"),
        (make_model("gpt2"), "for an encoder-decoder, got one for a decoder-only model"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(bart, Prefix(PrefixConfig(3, prefix_projection=False), other.config))
    with pytest.raises(ValueError, match="for a decoder-only model, got one for an encoder-decoder, with the sites"):
        patch(make_model("gpt2"), make_site_prefix(bart))
    assert not hasattr(bart, "prefix")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions=False, got True"),
        ({"cross_attn_head_mask": torch.ones(2, 4)}, "expected no cross_attn_head_mask"),
        ({"input_ids": None}, "input_ids or inputs_embeds, got neither"),
        ({"decoder_input_ids": torch.zeros(3, 4, dtype=torch.long)}, r"labels \(3, 4\), .* got \(3, 5\)"),
    ],
)
def test_refused_calls(arguments, message):
    model, batch = patch(make_seq2seq("bart"), 3).train(), make_seq2seq_batch("none")
    with pytest.raises(ValueError, match=message):
        model(**{**batch.arguments(), **arguments})


def test_four_dimensional_mask_with_relative_positions_is_refused():
    model, batch = patch(make_seq2seq("t5"), 3), make_seq2seq_batch("none")
    mask = torch.zeros(3, 1, 5, 5)
    with pytest.raises(NotImplementedError, match=r"a padding mask \[B, T\] in a model with relative positions"):
        model(**batch.arguments(), decoder_attention_mask=mask)


def test_text_start_is_refused():
    with pytest.raises(NotImplementedError, match="is an encoder-decoder, which has several sites"):
        Prefix.from_text(make_seq2seq("bart"), None, "a text")
