"""A patched encoder-decoder against an eager one with the prefix inside its keys and values: losses, gradients."""

import copy
import pickle

import pytest
import torch
from models_zoo import assert_close, twin
from seq2seq_zoo import (
    FAMILIES,
    SITES,
    attentions,
    make_seq2seq,
    make_seq2seq_batch,
    make_site_prefix,
    reference,
)

from prefix_fast.patching import patch, unpatch
from prefix_fast.prefix import Prefix, PrefixConfig

P = 4


def step(model, prefix, batch, computed=None, **arguments):
    """Logits (of computed positions), loss and the prefix's gradients by name of one training step."""
    prefix.zero_grad()
    out = model.train()(**{**batch.arguments(), **arguments})
    out.loss.backward()
    computed = batch.computed() if computed is None else computed
    return out.logits[computed], out.loss, {name: p.grad.clone() for name, p in prefix.named_parameters()}


def assert_same_step(found, expected):
    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1], expected[1], 1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert gradient.any()
        assert_close(found[2][name], gradient, 1e-5)


def both(family, sites=None, **changes):
    """A patched model and its reference, with prefixes of their own and equal."""
    model = make_seq2seq(family, **changes)
    prefix = make_site_prefix(model, P, sites)
    theirs = reference(twin(model), twin(prefix))
    return patch(model, prefix), prefix, theirs, attentions_prefix(theirs)


def attentions_prefix(model):
    return next(
        module.__dict__["reference_prefix"][0]
        for modules in attentions(model).values()
        for module in modules
        if "reference_prefix" in module.__dict__
    )


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_equals_concatenation(family, padding):
    ours, prefix, theirs, their_prefix = both(family)
    batch = make_seq2seq_batch(padding)
    assert_same_step(step(ours, prefix, batch), step(theirs, their_prefix, batch))


@pytest.mark.parametrize("sites", [("encoder",), ("decoder",), ("cross",), ("encoder", "cross")], ids="-".join)
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_sites_without_prefix(family, sites):
    ours, prefix, theirs, their_prefix = both(family, sites)
    assert tuple(prefix()) == sites
    batch = make_seq2seq_batch("left")
    assert_same_step(step(ours, prefix, batch), step(theirs, their_prefix, batch))


@pytest.mark.parametrize("family", ["bart", "t5", "m2m_100"])
def test_decoder_site_equals_prefix_in_transformers_own_cache(family):
    from transformers import DynamicCache, EncoderDecoderCache

    model, batch = make_seq2seq(family), make_seq2seq_batch("right")
    prefix = make_site_prefix(model, P, ("decoder",))
    keys, values = (states.expand(-1, 3, -1, -1, -1) for states in prefix()["decoder"])
    cache = EncoderDecoderCache(DynamicCache(list(zip(keys, values, strict=True))), DynamicCache())
    expected = twin(model)(past_key_values=cache, **batch.arguments())
    found = patch(model, prefix)(**batch.arguments())
    assert_close(found.logits, expected.logits, 1e-5)
    assert_close(found.loss, expected.loss, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_loss_equals_fused(family):
    model, batch = make_seq2seq(family), make_seq2seq_batch("left")
    prefix = make_site_prefix(model, P)
    fused, plain = patch(twin(model), twin(prefix)), patch(model, prefix, fused_loss=False)
    assert fused._prefix_fast.plan is not None
    found, expected = step(fused, fused.prefix, batch), step(plain, prefix, batch)
    assert_same_step(found, expected)
    decoder = {"decoder_input_ids": make_seq2seq_batch("none").labels}
    assert_same_step(step(fused, fused.prefix, batch, **decoder), step(plain, prefix, batch, **decoder))


def test_head_runs_on_labelled_positions_until_logits_are_read():
    model, batch = make_seq2seq("bart"), make_seq2seq_batch("right")
    patch(model, make_site_prefix(model, P)).train()
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[:-1].numel()))
    out = model(**batch.arguments())
    assert rows == [int((batch.labels != -100).sum())]
    assert out.logits.shape == (*batch.labels.shape, model.config.vocab_size)
    assert rows[1:] == [batch.labels.numel()]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_reparametrised_prefix_has_an_mlp_for_each_site(family):
    model, batch = make_seq2seq(family), make_seq2seq_batch("right")
    torch.manual_seed(3)
    prefix = Prefix(PrefixConfig(P, encoder_hidden_size=8), model.config)
    theirs = reference(twin(model), twin(prefix))
    ours = patch(model, prefix)
    found, expected = step(ours, prefix, batch), step(theirs, attentions_prefix(theirs), batch)
    assert {name.split(".")[1] for name in found[2]} == set(SITES)
    assert_same_step(found, expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_decoder_padding_on_the_left(family):
    ours, prefix, theirs, their_prefix = both(family)
    batch, mask = make_seq2seq_batch("none"), torch.ones(3, 5, dtype=torch.long)
    mask[1, :2], mask[2, :1] = 0, 0
    labels = batch.labels.masked_fill(mask == 0, -100)
    given = {"labels": labels, "decoder_input_ids": batch.labels, "decoder_attention_mask": mask}
    found, expected = (
        step(*each, batch, computed=mask.bool(), **given) for each in ((ours, prefix), (theirs, their_prefix))
    )
    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1], expected[1], 1e-5)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, 1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_called_by_itself_reads_its_prefix(family):
    ours, _, theirs, _ = both(family)
    batch = make_seq2seq_batch("left")
    decoder = {"decoder_input_ids": batch.labels.clamp(min=2), "attention_mask": batch.attention_mask}
    with torch.no_grad():
        states, expected = (model.get_encoder()(**batch.source()) for model in (ours, theirs))
        seen = batch.attention_mask.bool()
        assert_close(states[0][seen], expected[0][seen], 1e-5)
        whole = ours(**batch.source(), decoder_input_ids=decoder["decoder_input_ids"]).logits
        assert_close(ours(encoder_outputs=states, **decoder).logits, whole, 1e-6)


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "m2m_100"])
def test_unpatch_restores_everything(family):
    model, batch = make_seq2seq(family), make_seq2seq_batch("left")

    def state():
        return {
            name: (type(module), set(vars(module)), module.training, getattr(module, "config", None) and (
                module.config._attn_implementation
            ))
            for name, module in model.named_modules()
        }  # fmt: skip

    before, expected = state(), model(**batch.arguments())
    patch(model, 3)
    model(**batch.arguments())
    patch(model, make_site_prefix(model, 2, ("cross",)))
    unpatch(model)
    assert state() == before
    found = model(**batch.arguments())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_copies_and_pickles_keep_the_prefix(family, through):
    model, batch = make_seq2seq(family), make_seq2seq_batch("left")
    patch(model, make_site_prefix(model, P))
    expected = model(**batch.arguments())
    other = through(model)
    assert torch.equal(other(**batch.arguments()).logits, expected.logits)
    assert other.get_encoder()._prefix_fast_owner[0] is other
    unpatch(model)
    assert torch.equal(other(**batch.arguments()).logits, expected.logits)


def test_two_models_that_share_a_config():
    from transformers import T5ForConditionalGeneration

    batch = make_seq2seq_batch("right")
    model = make_seq2seq("t5")
    torch.manual_seed(5)
    other = T5ForConditionalGeneration(model.config).eval()
    plain = other(**batch.arguments()).logits
    patch(model, make_site_prefix(model, P))
    patched = model(**batch.arguments()).logits
    assert_close(other(**batch.arguments()).logits, plain, 1e-6)
    patch(other, make_site_prefix(other, P))
    unpatch(model)
    assert not torch.equal(other(**batch.arguments()).logits, plain)
    unpatch(other)
    assert torch.equal(other(**batch.arguments()).logits, plain)
    assert other.encoder.config._attn_implementation == "sdpa"
    patch(model, make_site_prefix(model, P))
    assert torch.equal(model(**batch.arguments()).logits, patched)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_gradient_checkpointing_changes_nothing(family):
    ours, prefix, _, _ = both(family)
    batch = make_seq2seq_batch("right")
    expected = step(ours, prefix, batch)
    ours.activation_checkpointing_enable()
    assert_same_step(step(ours, prefix, batch), expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_half_precision_model_with_float32_prefix(family):
    model, batch = make_seq2seq(family), make_seq2seq_batch("right")
    prefix = make_site_prefix(model, P)
    exact = step(reference(twin(model), (theirs := twin(prefix))), theirs, batch)
    ours = patch(model.to(torch.bfloat16), prefix)
    logits, loss, gradients = step(ours, prefix, batch)
    assert logits.dtype == torch.bfloat16
    assert_close(loss.float(), exact[1], 0.05)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    for name, gradient in exact[2].items():
        assert_close(gradients[name], gradient, 0.2)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_no_virtual_tokens_is_the_plain_model(family):
    model, batch = make_seq2seq(family), make_seq2seq_batch("right")
    expected = twin(model)(**batch.arguments())
    patch(model, 0)
    assert model.prefix is None and not any(parameter.requires_grad for parameter in model.parameters())
    assert_close(model(**batch.arguments()).logits, expected.logits, 1e-5)
    assert_close(model.train()(**batch.arguments()).loss, expected.loss, 1e-5)


def test_model_that_is_trained_too_is_saved_whole(tmp_path):
    from transformers import BartForConditionalGeneration

    model, batch = make_seq2seq("bart"), make_seq2seq_batch("left")
    patch(model, make_site_prefix(model, P), freeze=False).train()
    model(**batch.arguments()).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "layernorm" in name)
    model.save_pretrained(tmp_path)
    again = BartForConditionalGeneration.from_pretrained(tmp_path)
    patch(again, tmp_path / "prefix")
    assert_close(again(**batch.arguments()).logits, model.eval()(**batch.arguments()).logits, 1e-6)


def test_model_with_a_patched_part_is_refused():
    model, batch = make_seq2seq("bart"), make_seq2seq_batch("right")
    patch(model, make_site_prefix(model, P))
    expected = model(**batch.arguments()).logits
    with pytest.raises(ValueError, match="no part is patched, got BartModel; patch the model that is patched"):
        patch(model.model, 3)
    assert torch.equal(model(**batch.arguments()).logits, expected)
    unpatch(model)
    patch(model.model, 3)
    with pytest.raises(ValueError, match="no part is patched, got BartForConditionalGeneration"):
        patch(model, 3)


def test_attention_that_came_after_patching_raises():
    model, batch = make_seq2seq("bart"), make_seq2seq_batch("right")
    fresh = twin(model).get_decoder().layers[0]
    fresh.self_attn.config = model.config
    patch(model, 3)
    model.get_decoder().layers[0] = fresh
    fresh.encoder_attn.config = model.config
    with pytest.raises(RuntimeError, match="patch the model again after changing it"):
        model(**batch.arguments())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_compiled_step_is_one_graph_and_equal(family):
    ours, prefix, _, _ = both(family)
    batch = make_seq2seq_batch("left")
    expected = step(ours, prefix, batch)
    assert_same_step(step(torch.compile(ours, fullgraph=True, backend="aot_eager"), prefix, batch), expected)
