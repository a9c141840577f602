"""A patched PeftModel against the same PeftModel unpatched: losses, gradients, trajectories, files, adapters."""

import copy
import pickle

import pytest
import torch
from models_zoo import WITH_EXTRAS, assert_close, make_batch, make_model, make_peft
from peft_steps import assert_same_files, assert_same_step, assert_same_training, step

from prefix_fast.patching import patch, unpatch

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "direct"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_three_optimizer_steps_are_equal(family, projection, padding):
    theirs = make_peft(family, prefix_projection=projection)
    ours = patch(copy.deepcopy(theirs))
    assert_same_training(ours, theirs, [make_batch(padding, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", WITH_EXTRAS)
def test_window_counts_prefix_positions(family, padding):
    theirs = make_peft(family)
    theirs.base_model.set_attn_implementation("eager")
    ours, batch = patch(copy.deepcopy(theirs)), make_batch(padding, tokens=11)
    assert_same_step(step(ours, batch), step(theirs, batch))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_arguments_as_peft_takes_them(family):
    theirs = make_peft(family)
    ours, batch = patch(copy.deepcopy(theirs)), make_batch("none")
    positions = torch.arange(9)[None].expand(3, -1) + 2
    for arguments in ({"position_ids": positions}, {"position_ids": positions, "attention_mask": None}):
        assert_same_step(step(ours, batch, **arguments), step(theirs, batch, **arguments))
    embeddings = theirs.get_input_embeddings()(batch.input_ids)
    for model in (ours, theirs):
        model.eval()
    assert_close(ours(batch.input_ids).logits, theirs(batch.input_ids).logits)
    assert_close(ours(inputs_embeds=embeddings).logits, theirs(inputs_embeds=embeddings).logits)
    assert_close(ours(batch.input_ids, return_dict=False)[0], theirs(batch.input_ids, return_dict=False)[0])


def test_bfloat16_model_takes_the_prefix_in_its_dtype():
    theirs, batch = make_peft("llama", dtype=torch.bfloat16), make_batch("left")
    ours = patch(copy.deepcopy(theirs))
    (loss, gradients), (their_loss, their_gradients) = step(ours, batch), step(theirs, batch)
    assert_close(loss, their_loss, 0.01)
    for name, gradient in their_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        assert_close(gradients[name].float(), gradient.float(), 0.1)


@pytest.mark.parametrize("projection", [True, False], ids=["projection", "direct"])
def test_saved_files_are_equal_byte_for_byte(tmp_path, projection):
    theirs = make_peft("llama", prefix_projection=projection)
    ours = patch(copy.deepcopy(theirs))
    assert_same_files(tmp_path, ours, theirs)
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "ours")
    batch = make_batch("left")
    expected = loaded(batch.input_ids, attention_mask=batch.attention_mask).logits
    found = patch(loaded)(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert loaded.active_peft_config.inference_mode
    assert_close(found, expected)


def test_parameters_and_names_stay():
    model = make_peft("gpt2", prefix_projection=True)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    kinds = (type(model).__name__, type(model.base_model).__name__, type(model.base_model).__module__)
    patch(model)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert (type(model).__name__, type(model.base_model).__name__, type(model.base_model).__module__) == kinds
    assert isinstance(model, peft.PeftModelForCausalLM)


def test_disabled_adapter_is_the_base_model():
    model, batch = make_peft("llama").eval(), make_batch("left")
    patch(model)
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    base = make_model("llama")
    generate = {"max_new_tokens": 5, "pad_token_id": 2, "do_sample": False}
    with model.disable_adapter():
        assert_close(model(**arguments).logits, base(**arguments).logits, 1e-5)  # its norms and MLPs are fused
        assert torch.equal(model.generate(**arguments, **generate), base.generate(**arguments, **generate))
    assert not torch.equal(model(**arguments).logits, base(**arguments).logits)


def test_several_adapters():
    theirs, batch = make_peft("gpt2").eval(), make_batch("left")
    patched = patch(copy.deepcopy(theirs))
    for model in (theirs, patched):
        torch.manual_seed(5)
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model.add_adapter("other", config)
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    for name in ("other", "default"):
        theirs.set_adapter(name)
        patched.set_adapter(name)
        assert_close(patched(**arguments).logits, theirs(**arguments).logits)


def test_modules_to_save_stay_trainable():
    theirs, batch = make_peft("llama", modules_to_save=["lm_head"]), make_batch("left")
    ours = patch(copy.deepcopy(theirs))
    found, expected = step(ours, batch), step(theirs, batch)
    assert any("lm_head" in name for name in expected[1])
    assert_same_step(found, expected)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_prefix(copy_of):
    model, batch = patch(make_peft("gpt2")), make_batch("left")
    again = copy_of(model)
    assert_same_step(step(again, batch), step(model, batch))
    assert again.base_model is not model.base_model


def test_unpatch_restores():
    model, batch = make_peft("gpt2"), make_batch("left")
    kinds, keys, base_keys = (type(model), type(model.base_model)), set(vars(model)), set(vars(model.base_model))
    expected = step(model, batch)
    for _ in range(2):
        patch(model)
        patch(model)
        step(model, batch)
        unpatch(model)
        assert (type(model), type(model.base_model)) == kinds
        assert (set(vars(model)), set(vars(model.base_model))) == (keys, base_keys)
    loss, gradients = step(model, batch)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())


def test_gradient_checkpointing_where_peft_fails():
    model, batch = patch(make_peft("llama", prefix_projection=True)), make_batch("left")
    expected = step(model, batch)
    model.base_model.activation_checkpointing_enable()
    assert_same_step(step(model, batch), expected)


def test_user_cache_is_discarded_as_in_peft():
    theirs, batch = make_peft("gpt2").eval(), make_batch("none")
    ours = patch(copy.deepcopy(theirs))
    cache = ours.base_model(batch.input_ids).past_key_values
    expected = theirs(batch.input_ids, past_key_values=copy.deepcopy(cache)).logits
    assert_close(ours(batch.input_ids, past_key_values=cache).logits, expected)
