"""What patching leaves behind and what it does not: freezing, copies, shared configs, unpatching, checkpointing."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from models_zoo import assert_close, make_batch, make_model, make_prefix, twin

from prefix_fast.patching import patch, unpatch
from prefix_fast.prefix import PrefixConfig

P = 5


def logits_of(model, batch):
    with torch.no_grad():
        return model(batch.input_ids, attention_mask=batch.attention_mask).logits


def gradients_of(model, batch):
    model.train()
    model.zero_grad()
    model(**batch.arguments()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.prefix.named_parameters()}


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unpatch_restores_everything(implementation):
    model, batch = make_model("gpt2"), make_batch("left")
    model.set_attn_implementation(implementation)
    model.transformer.wte.weight.requires_grad_(False)
    before = {
        "class": type(model),
        "attributes": set(vars(model)),
        "modules": [name for name, _ in model.named_modules()],
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "signature": inspect.signature(model.forward),
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "keys": list(model.state_dict()),
    }
    expected = logits_of(model, batch)
    assert patch(model, 3) is model
    logits_of(model, batch)
    assert unpatch(model) is model
    after = {
        "class": type(model),
        "attributes": set(vars(model)),
        "modules": [name for name, _ in model.named_modules()],
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "signature": inspect.signature(model.forward),
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "keys": list(model.state_dict()),
    }
    assert after == before
    assert torch.equal(logits_of(model, batch), expected)


def test_class_looks_like_before():
    model = make_model("llama")
    kind, signature = type(model), inspect.signature(model.forward)
    patch(model, 3)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert isinstance(model, kind) and inspect.signature(model.forward) == signature
    assert type(patch(make_model("llama"), 3)) is type(model)


def test_language_model_is_frozen():
    model, batch = patch(make_model("llama"), 3).train(), make_batch("left")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(name.startswith("prefix.") for name in trainable)
    model(**batch.arguments()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == trainable


def test_freeze_false_trains_the_model_too():
    model, batch = patch(make_model("llama"), 3, freeze=False).train(), make_batch("left")
    model(**batch.arguments()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    unpatch(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_keep_the_prefix_and_share_nothing(copied):
    model, batch = make_model("llama"), make_batch("left")
    patch(model, make_prefix(model, P))
    again = copied(model)
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    assert again.config is not model.config and again.prefix is not model.prefix
    unpatch(model)
    assert not torch.equal(logits_of(again, batch), logits_of(model, batch))
    assert torch.equal(logits_of(unpatch(again), batch), logits_of(model, batch))


def test_second_patch_replaces_the_prefix():
    model, batch = make_model("gpt2"), make_batch("left")
    plain = logits_of(model, batch)
    expected = logits_of(patch(twin(model), make_prefix(model, 4, seed=7)), batch)
    patch(model, make_prefix(model, P))
    patch(model, make_prefix(model, 4, seed=7), backend="reference", fused_loss=False)
    assert_close(logits_of(model, batch), expected, 1e-6)
    unpatch(model)
    assert torch.equal(logits_of(model, batch), plain)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_failed_patch_leaves_the_model_as_it_was():
    model, batch = make_model("gpt2"), make_batch("left")
    patch(model, make_prefix(model, P))
    expected = logits_of(model, batch)
    with pytest.raises(ValueError, match="num_layers"):
        patch(model, make_prefix(make_model("gpt2", n_layer=3)))
    assert torch.equal(logits_of(model, batch), expected)
    other = make_model("llama")
    with pytest.raises(ValueError, match="num_kv_heads"):
        patch(other, make_prefix(model))
    assert other.config._attn_implementation == "sdpa" and not hasattr(other, "prefix")


def test_two_patched_models_side_by_side():
    models = [make_model("llama", seed=seed) for seed in range(2)]
    batch = make_batch("left")
    expected = [logits_of(patch(twin(m), make_prefix(m, 3 + i, seed=i)), batch) for i, m in enumerate(models)]
    for i, model in enumerate(models):
        patch(model, make_prefix(model, 3 + i, seed=i))
    for model, logits in zip(models, expected, strict=True):
        assert torch.equal(logits_of(model, batch), logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_model_that_shares_the_config_is_unchanged(family, implementation):
    model, batch = make_model(family), make_batch("left")
    model.set_attn_implementation(implementation)
    other = type(model)(model.config).eval()
    assert other.config is model.config
    options = {"max_new_tokens": 4, "pad_token_id": 2, "do_sample": False}
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    static = {"cache_implementation": "static"}
    expected = [logits_of(other, batch), other.generate(**arguments, **options)]
    expected += [other.generate(**arguments, **options, **static)]
    patch(model, make_prefix(model, P))
    found = [logits_of(other, batch), other.generate(**arguments, **options)]
    found += [other.generate(**arguments, **options, **static)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_unpatching_one_of_two_on_a_shared_config():
    model, batch = make_model("llama"), make_batch("left")
    other = type(model)(model.config).eval()
    plain = [logits_of(each, batch) for each in (model, other)]
    for each in (model, other):
        patch(each, make_prefix(each, P))
    expected = logits_of(other, batch)
    unpatch(model)
    assert torch.equal(logits_of(other, batch), expected)
    assert torch.equal(logits_of(model, batch), plain[0])
    unpatch(other)
    assert torch.equal(logits_of(other, batch), plain[1])
    assert model.config._attn_implementation == "sdpa"


def test_cross_attention_of_gpt2_reads_no_prefix():
    from models_zoo import cache_with, random_states, with_prefix_mask

    model, batch = make_model("gpt2", add_cross_attention=True), make_batch("left")
    encoded = torch.randn(3, 7, 32)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    outside = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
    keys, values = random_states(model, P)
    expected = twin(model)(
        batch.input_ids,
        attention_mask=with_prefix_mask(batch.attention_mask, P),
        past_key_values=cache_with(keys, values, 3),
        **outside,
    ).logits
    patch(model, make_prefix(model, P))
    found = model(batch.input_ids, attention_mask=batch.attention_mask, **outside).logits
    assert_close(found, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_gives_the_same_gradients(family, when):
    model, batch = make_model(family), make_batch("left")
    expected = gradients_of(patch(twin(model), PrefixConfig(P, encoder_hidden_size=8)), batch)
    if when == "before":
        model.activation_checkpointing_enable()
    torch.manual_seed(0)
    patch(model, PrefixConfig(P, encoder_hidden_size=8))
    model.prefix.load_state_dict(patch_state(expected, model))
    if when == "after":
        model.activation_checkpointing_enable({})
    assert model.is_activation_checkpointing
    found = gradients_of(model, batch)
    reference = patch(make_model(family), copy.deepcopy(model.prefix))
    for name, gradient in gradients_of(reference, batch).items():
        assert_close(found[name], gradient, 1e-5)


def patch_state(gradients, model):
    """The model's own prefix state: checked to have a gradient for each name."""
    assert gradients.keys() == dict(model.prefix.named_parameters()).keys()
    return model.prefix.state_dict()


def test_static_training_flags_are_kept():
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    prefix = make_prefix(model)
    patch(model, prefix)
    assert torch.equal(torch.get_rng_state(), state)
    unpatch(model)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("attention", ["mask", "no mask"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_training_step_in_one_graph(family, attention):
    model, batch = make_model(family), make_batch("left")
    patch(model, make_prefix(model, P))
    given = batch.arguments() if attention == "mask" else {"input_ids": batch.input_ids, "labels": batch.labels}
    model.train()
    expected = model(**given).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.prefix.parameters()]
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**given)
    assert out.logits is None
    out.loss.backward()
    assert_close(out.loss, expected, 1e-5)
    for parameter, gradient in zip(model.prefix.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient)
