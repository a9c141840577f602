"""Encoder-decoders train without computing padding: the numbers of the same model that computes all of it."""

import copy

import pytest
import torch
from models_zoo import assert_close, twin
from seq2seq_zoo import attentions, make_seq2seq, make_seq2seq_batch, make_site_prefix, reference
from shared_batches import make_features, shared

from prefix_fast import PrefixBank, PrefixConfig, patch, unpatch
from prefix_fast.models import packed_seq2seq

P = 4
PACKED = ("bart", "mbart", "plbart", "marian", "pegasus", "blenderbot", "blenderbot-small")


@pytest.fixture
def packings(monkeypatch):
    """The rows of every batch that was packed; a call that was not adds None."""
    found, function = [], packed_seq2seq.padding_free
    monkeypatch.setattr(packed_seq2seq, "padding_free", lambda *args: found.append(function(*args)) or found[-1])
    return found


def make_batch(padding="left", **sizes):
    """As `make_seq2seq_batch`; "scattered": holes in the sources."""
    batch = make_seq2seq_batch("right" if padding == "scattered" else padding, **sizes)
    if padding != "scattered":
        return batch
    mask = torch.ones_like(batch.attention_mask)
    mask[0, 2], mask[1, 0], mask[1, 3:5], mask[2, 1::2] = 0, 0, 0, 0
    return batch._replace(attention_mask=mask)


def step(model, arguments):
    """Output, then loss and gradients of one call."""
    model.zero_grad()
    out = model.train()(**arguments)
    out.loss.backward()
    return out, [out.loss, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


def assert_same_step(model, other, batch, computed=None, **arguments):
    """Loss, gradients, logits of computed positions, and the encoder's states of what is attended to."""
    given = {**batch.arguments(), **arguments}
    (ours, found), (theirs, expected) = step(model, given), step(other, given)
    for ours_part, theirs_part in zip(found, expected, strict=True):
        assert (ours_part is None) == (theirs_part is None)
        if theirs_part is not None:
            assert_close(ours_part, theirs_part, 1e-5)
    computed = batch.computed() if computed is None else computed
    assert ours.logits.shape == theirs.logits.shape and ours.keys() == theirs.keys()
    assert_close(ours.logits[computed], theirs.logits[computed], 1e-5)
    seen, states = batch.attention_mask.bool(), ours.encoder_last_hidden_state
    assert states.shape == theirs.encoder_last_hidden_state.shape
    assert_close(states[seen], theirs.encoder_last_hidden_state[seen], 1e-5)
    return ours


def both(model, prefix=None, **options):
    prefix = make_site_prefix(model, P) if prefix is None else prefix
    return patch(twin(model), prefix, **options), patch(model, twin(prefix), padding_free=False, **options)


@pytest.mark.parametrize("padding", ["left", "right", "scattered"])
@pytest.mark.parametrize("family", PACKED)
def test_step_equals_the_one_that_computes_padding(family, padding, packings):
    batch = make_batch(padding)
    assert_same_step(*both(make_seq2seq(family)), batch)
    (pairs,) = packings
    assert pairs.source.index.numel() == batch.attention_mask.sum()
    assert pairs.target.index.numel() == batch.computed().sum()


def test_step_equals_concatenation(packings):
    model, batch = make_seq2seq("bart"), make_batch("scattered")
    prefix = make_site_prefix(model, P)
    theirs = reference(twin(model), its := twin(prefix))
    (_, found), out = step(patch(model, prefix), batch.arguments()), theirs.train()(**batch.arguments())
    out.loss.backward()
    for ours, expected in zip(found, [out.loss, *(each.grad for each in its.parameters())], strict=True):
        assert_close(ours, expected, 1e-5)
    assert packings[0] is not None


@pytest.mark.parametrize("family", ["m2m_100", "t5"])
def test_model_whose_positions_cannot_be_told_computes_padding(family, packings):
    assert_same_step(*both(make_seq2seq(family)), make_batch("right"))
    assert packings == [None]


def tokens_of_linears(model):
    """How many tokens the MLPs of encoder and decoder have computed, call by call."""
    counts = {"encoder": [], "decoder": []}
    for name, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        part.layers[-1].fc1.register_forward_hook(
            lambda module, args, out, name=name: counts[name].append(args[0].shape[:-1].numel())
        )
    return counts


def test_layers_see_computed_positions_alone():
    model, batch = patch(make_seq2seq("bart"), P), make_batch("left")
    counts = tokens_of_linears(model)
    model.train()(**batch.arguments())
    assert counts == {"encoder": [int(batch.attention_mask.sum())], "decoder": [int(batch.computed().sum())]}
    assert counts["encoder"][0] < batch.input_ids.numel() and counts["decoder"][0] < batch.labels.numel()
    model.eval()(**batch.arguments())
    assert counts["encoder"][1:] == [batch.input_ids.numel()] and counts["decoder"][1:] == [batch.labels.numel()]


def test_left_out_positions_are_zeros():
    model, batch = patch(make_seq2seq("bart"), P).train(), make_batch("right")
    model.final_logits_bias.fill_(0.25)
    out = model(**batch.arguments())
    assert (out.logits[~batch.computed()] == 0.25).all() and (out.logits[batch.computed()] != 0.25).any(-1).all()
    assert not out.encoder_last_hidden_state[batch.attention_mask == 0].any()


@pytest.mark.parametrize("family", ["bart", "pegasus"])
def test_more_tokens_than_a_row_may_have(family, packings):
    batch = make_seq2seq_batch("right", rows=5, source=30, target=30)
    assert_same_step(*both(make_seq2seq(family, max_position_embeddings=40)), batch)
    assert packings[0].source.index.numel() > 40 and packings[0].target.index.numel() > 40


def test_target_beyond_the_table_raises():
    model, batch = patch(make_seq2seq("bart"), 60).train(), make_batch("right")
    with pytest.raises(ValueError, match="within the model's 64 positions, got position 64"):
        model(**batch.arguments())


def masked_targets(kind):
    """Labels, the decoder's input, its mask or None, and what is computed."""
    batch = make_seq2seq_batch("none", target=6)
    labels, ids, mask = batch.labels.clone(), batch.labels.flip(1).clone(), torch.ones_like(batch.labels)
    if kind == "mask-left":
        mask[1, :2], mask[2, :3] = 0, 0
    elif kind == "mask-scattered":
        mask[0, 2], mask[1, 1], mask[1, 4:] = 0, 0, 0
    elif kind == "mask-beyond-labels":  # attended to, though no label reads it
        mask[1, 5], labels[1, 2:], labels[2, 3:] = 0, -100, -100
    if kind.startswith("mask"):
        return {"labels": labels.masked_fill(mask == 0, -100), "decoder_input_ids": ids, "decoder_attention_mask": mask}
    # No mask: padding are the pad tokens at the end, behind the last label; not one between others.
    ids[1, 4:], ids[2, 1], ids[2, 4], labels[1, 3:], labels[2, 3:] = 2, 2, 2, -100, -100
    return {"labels": labels, "decoder_input_ids": ids}


@pytest.mark.parametrize("kind", ["mask-left", "mask-scattered", "mask-beyond-labels", "ids-alone"])
def test_decoder_inputs_of_the_caller(kind, packings):
    given, batch = masked_targets(kind), make_batch("left", target=6)
    computed = given.get("decoder_attention_mask", torch.ones_like(given["labels"])).bool()
    if kind == "ids-alone":
        computed[1, 4:] = False
    assert_same_step(*both(make_seq2seq("bart")), batch, computed, **given)
    assert packings[0].target.index.tolist() == computed.flatten().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("mask", ["none", "given"])
def test_embedded_inputs(mask, packings):
    model, batch = make_seq2seq("bart"), make_batch("left")
    ours, theirs = both(model)
    source, target = (ours.get_input_embeddings()(ids).detach() for ids in (batch.input_ids, batch.labels.clamp(2)))
    given = {"input_ids": None, "inputs_embeds": source, "decoder_inputs_embeds": target}
    computed = torch.ones_like(batch.labels, dtype=torch.bool)  # what embeddings are padding is not known
    if mask == "given":
        computed = batch.labels != -100
        given["decoder_attention_mask"] = computed
    assert_same_step(ours, theirs, batch, computed, **given)
    assert packings[0].target.index.numel() == computed.sum()


def test_label_that_is_the_pad_token_is_no_padding(packings):
    model, batch = make_seq2seq("bart"), make_batch("right")
    batch.labels[1, 3], batch.labels[2, 1:3] = 2, 2
    assert_same_step(*both(model), batch)
    assert packings[0].target.index.numel() == batch.computed().sum()


def test_rows_without_a_label_or_a_source(packings):
    model, batch = make_seq2seq("pegasus", decoder_start_token_id=2), make_batch("right")
    batch.labels[1], batch.attention_mask[1] = -100, 0
    batch.attention_mask[0] = 0
    assert_same_step(*both(model), batch)
    assert packings[0] is not None


@pytest.mark.parametrize("changes", [{"labels": make_batch("none").labels}, {"attention_mask": None}], ids=["s", "t"])
def test_padding_on_one_side_alone(changes, packings):
    batch = make_batch("right")
    seen = batch.attention_mask if "labels" in changes else torch.ones_like(batch.attention_mask)
    batch = batch._replace(**{"attention_mask": seen, **{k: v for k, v in changes.items() if v is not None}})
    assert_same_step(*both(make_seq2seq("bart")), batch, **changes)
    pairs = packings[0]
    assert pairs.source.index.numel() == seen.sum() and pairs.target.index.numel() == batch.computed().sum()


def test_trained_model_has_the_same_gradients(packings):
    model, batch = make_seq2seq("mbart"), make_batch("left")
    assert_same_step(*both(model, freeze=False), batch)
    assert packings[0] is not None


def test_rows_of_a_bank_keep_their_prefix(packings):
    model, batch = make_seq2seq("bart"), make_batch("scattered")
    bank = PrefixBank({"a": make_site_prefix(model, 3), "b": make_site_prefix(model, 7, scale=0.5)})
    assert_same_step(*both(model, bank), batch, prefix_ids=["b", None, "a"])
    assert packings[0] is not None


@pytest.mark.parametrize("sites", [("decoder",), ("encoder", "cross")], ids="-".join)
def test_sites_without_prefix(sites, packings):
    model = make_seq2seq("bart")
    assert_same_step(*both(model, make_site_prefix(model, P, sites)), make_batch("left"))
    assert packings[0] is not None


def test_no_virtual_tokens(packings):
    model, batch = make_seq2seq("bart"), make_batch("left")
    out = patch(twin(model), 0).train()(**batch.arguments())
    assert_close(out.loss, model.train()(**batch.arguments()).loss, 1e-5)
    assert packings[0] is not None


@pytest.mark.parametrize("given", ["labels-alone", "decoder-mask"])
def test_peft_model_trains_without_padding(given, packings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(make_seq2seq("bart", decoder_attention_heads=4), config)
    ours, batch = patch(copy.deepcopy(theirs)), make_batch("right")
    mask = (batch.labels != -100).long()
    more = {"decoder_input_ids": batch.labels.clamp(2), "decoder_attention_mask": mask}
    arguments = {**batch.arguments(), **(more if given == "decoder-mask" else {})}
    for found, expected in zip(step(ours, arguments)[1], step(theirs, arguments)[1], strict=True):
        assert_close(found, expected, 1e-5)
    assert packings[0] is not None


@pytest.mark.parametrize("options", [None, {"keep_attention": True}], ids=["plain", "attention-kept"])
def test_checkpointed_step_is_the_same(options, packings):
    ours, theirs = both(make_seq2seq("bart"))
    ours.activation_checkpointing_enable(options)
    assert_same_step(ours, theirs, make_batch("left"))
    assert packings[0] is not None


def test_half_precision_step_is_as_exact(packings):
    batch, model = make_batch("left"), make_seq2seq("bart")
    truth = step(both(twin(model))[1], batch.arguments())[1]
    ours, theirs = (step(each, batch.arguments())[1] for each in both(model.to(torch.bfloat16)))
    for found, rival, exact in zip(ours, theirs, truth, strict=True):
        error, allowed = ((tensor.float() - exact).abs().max() for tensor in (found, rival))
        assert error <= 2 * allowed + 0.02 * exact.abs().max()
    assert packings[0] is not None


def test_half_precision_compute(any_half, packings):
    model, batch = make_seq2seq("bart"), make_batch("left")
    ours, theirs = both(model, compute_dtype=torch.bfloat16)
    for found, expected in zip(*(step(each, batch.arguments())[1] for each in (ours, theirs)), strict=True):
        assert_close(found, expected, 0.05)
    assert packings[0] is not None


def test_returned_cache_is_that_of_the_padded_batch():
    model, batch = make_seq2seq("plbart"), make_batch("left")
    ours, theirs = (each.train()(**batch.arguments()).past_key_values for each in both(model))
    seen = {"self_attention_cache": batch.computed(), "cross_attention_cache": batch.attention_mask.bool()}
    for name, computed in seen.items():
        layers = zip(getattr(ours, name).layers, getattr(theirs, name).layers, strict=True)
        for found, expected in ((getattr(m, kind), getattr(o, kind)) for m, o in layers for kind in ("keys", "values")):
            assert found.shape == expected.shape
            assert_close(found.transpose(1, 2)[computed], expected.transpose(1, 2)[computed], 1e-5)


def refused(change, batch):
    """Arguments of a call that is computed whole."""
    if change == "label-in-hidden-target":
        mask = torch.ones_like(batch.labels)
        mask[0, 2] = 0
        return {"decoder_input_ids": batch.labels.clamp(2), "decoder_attention_mask": mask}
    if change == "four-dimensional-mask":
        mask = batch.attention_mask[:, None, None].expand(-1, 1, batch.input_ids.shape[1], -1)
        return {"attention_mask": torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo().min)}
    if change == "no-padding":
        return make_batch("none").arguments()
    return {"output_hidden_states": True}


@pytest.mark.parametrize("change", ["label-in-hidden-target", "four-dimensional-mask", "no-padding", "hidden-states"])
def test_what_cannot_be_left_out_is_computed(change, packings):
    model, batch = make_seq2seq("bart"), make_batch("left")
    given = refused(change, batch)
    if change == "four-dimensional-mask":  # BART hands it to the cross-attention too, whose queries are the targets
        given = {**given, "labels": make_seq2seq_batch("left", target=7).labels}
    (ours, found), (theirs, expected) = (step(each, {**batch.arguments(), **given}) for each in both(model))
    for mine, other in zip([*found, ours.logits], [*expected, theirs.logits], strict=True):
        assert_close(mine, other, 1e-6)
    assert packings == [None]


def test_calls_of_other_forms_are_computed_whole(packings):
    ours, theirs = both(make_seq2seq("bart"))
    batch, counts = make_batch("left"), tokens_of_linears(ours)
    encoded = ours.train().get_encoder()(**batch.source())
    unlabelled = torch.full_like(batch.labels, -100)
    for given in ({"encoder_outputs": encoded}, {"labels": unlabelled}, {"return_dict": False}):
        arguments = {**batch.arguments(), **given}
        found, expected = (each.train()(**arguments)[0] for each in (ours, theirs))
        assert torch.equal(found.isnan(), expected.isnan())
        assert_close(found.nan_to_num(), expected.nan_to_num(), 1e-6)
    assert counts["decoder"] == [batch.labels.numel()] * 3
    assert not any(packings)


def not_causal(model):
    attentions(model)["decoder"][1].is_causal = False


def no_positions(model):
    model.get_encoder().embed_positions.forward = lambda shape: torch.zeros(1, shape.shape[1], 32)


@pytest.mark.parametrize("change", [not_causal, no_positions], ids=lambda change: change.__name__)
def test_model_that_attends_or_counts_in_another_way_is_computed_whole(change, packings):
    batch, models = make_batch("left"), both(make_seq2seq("bart"))
    for each in models:
        change(each)
    for _ in range(2):
        for found, expected in zip(*(step(each, batch.arguments())[1] for each in models), strict=True):
            assert_close(found, expected, 1e-6)
    assert packings[0] is not None and len(packings) == 1  # refused once, and not tried again


def test_padding_is_computed_where_asked_for(packings):
    model, batch = patch(make_seq2seq("bart"), P, padding_free=False).train(), make_batch("left")
    counts = tokens_of_linears(model)
    model(**batch.arguments())
    assert counts == {"encoder": [batch.input_ids.numel()], "decoder": [batch.labels.numel()]} and packings == []


def test_unpatched_position_embeddings_are_their_own_classes_again():
    model, batch = make_seq2seq("bart"), make_batch("left")
    own = [type(part.embed_positions) for part in (model.get_encoder(), model.get_decoder())]
    patch(model, PrefixConfig(P, prefix_projection=False))
    again = copy.deepcopy(model).train()
    assert_close(again(**batch.arguments()).loss, model.train()(**batch.arguments()).loss, 1e-6)
    unpatch(model)
    assert [type(part.embed_positions) for part in (model.get_encoder(), model.get_decoder())] == own
    assert not any(name.startswith("_prefix_fast") for module in model.modules() for name in vars(module))


def assert_same_shared_step(models, features):
    found = [step(each, {**shared(features), "per_token_logps": True}) for each in models]
    for ours, expected in zip(found[0][1], found[1][1], strict=True):
        assert_close(ours, expected, 1e-5)
    assert_close(found[0][0].per_token_logps, found[1][0].per_token_logps, 1e-5)


@pytest.mark.parametrize("family", ["mbart", "pegasus"])
def test_shared_sources_are_read_once_and_without_padding(family):
    models, features = both(make_seq2seq(family)), make_features()
    counts, cross = tokens_of_linears(models[0]), []
    attentions(models[0])["cross"][0].k_proj.register_forward_hook(
        lambda module, args, out: cross.append(args[0].shape[:-1].numel())
    )
    assert_same_shared_step(models, features)
    batch = shared(features)
    sources, targets = int(batch["source_mask"].sum()), int(batch["target_mask"].sum())
    assert (counts["encoder"], counts["decoder"], cross) == ([sources], [targets], [sources])
    alone = {name: value for name, value in batch.items() if name != "labels"}
    for training in (True, False):
        ours, theirs = (each.train(training)(**alone, per_token_logps=True).per_token_logps for each in models)
        assert_close(ours, theirs, 1e-5)
    assert (counts["encoder"], counts["decoder"]) == ([sources] * 3, [targets] * 3)


def test_shared_sources_of_a_model_that_attends_in_another_way_are_padded():
    models = both(make_seq2seq("bart"))
    for each in models:
        not_causal(each)
    assert_same_shared_step(models, make_features())
    assert not models[0]._prefix_fast.packs
