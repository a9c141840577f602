"""What cannot be patched, and what a patched model refuses: errors that say what came and what to do."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from models_zoo import make_batch, make_model, make_peft, make_prefix
from torch import nn

from prefix_fast import dispatch
from prefix_fast.patching import patch, unpatch
from prefix_fast.prefix import PrefixConfig

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name, **config):
    import transformers as hf

    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**config))


def falcon():
    return build("Falcon", **TINY)


def gptj():
    return build(
        "GPTJ",
        vocab_size=61,
        bos_token_id=0,
        eos_token_id=1,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=32,
    )


def bloom():
    return build("Bloom", vocab_size=61, hidden_size=32, n_layer=2, n_head=4)


def mamba():
    return build("Mamba", vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)


def led():
    import transformers as hf

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return hf.LEDForConditionalGeneration(hf.LEDConfig(vocab_size=61, d_model=16, attention_window=4, **sizes))


def biogpt():
    return build("BioGpt", **TINY, intermediate_size=32)


def compressed():
    return build(
        "DeepseekV3",
        **TINY,
        num_key_value_heads=4,
        intermediate_size=32,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )


def doge():
    return build("Doge", **TINY, intermediate_size=32)


def stablelm():
    return build("StableLm", **TINY, num_key_value_heads=4, intermediate_size=32)


def split_over_devices():
    model = make_model("llama")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    return model


def on_meta():
    return make_model("llama").to("meta")


def with_a_prefix():
    model = make_model("llama")
    model.prefix = nn.Linear(2, 2)
    return model


def reentrant():
    model = make_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    return model


def untransformed():
    return nn.Linear(2, 2)


def with_another_attention():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("my_attention", sdpa_attention_forward)
    model = make_model("llama")
    model.set_attn_implementation("my_attention")
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (falcon, NotImplementedError, "attention interface"),
        (gptj, NotImplementedError, "attention interface"),
        (bloom, NotImplementedError, "attention interface"),
        (mamba, (NotImplementedError, ValueError), "num_attention_heads|attention"),
        (led, NotImplementedError, "got LEDForConditionalGeneration, which computes attention in its own modules"),
        (biogpt, NotImplementedError, "positions can be shifted"),
        (compressed, NotImplementedError, "kv_lora_rank"),
        (doge, NotImplementedError, "masks down to the attention as they are, got DogeForCausalLM"),
        (stablelm, NotImplementedError, r"each of StableLmForCausalLM's 2 layers once, got layers \[\]"),
        (split_over_devices, NotImplementedError, r"on one device, got LlamaForCausalLM on \['cpu', 'cuda:0'\]"),
        (on_meta, NotImplementedError, "a model with weights, got LlamaForCausalLM on the meta device"),
        (with_a_prefix, NotImplementedError, "without an attribute `prefix`"),
        (reentrant, ValueError, "use_reentrant=False, got True"),
        (untransformed, TypeError, "a transformers model or a PeftModel, got Linear"),
        (with_another_attention, NotImplementedError, "attn_implementation='my_attention'"),
    ],
    ids=lambda value: value.__name__ if callable(value) and not isinstance(value, type) else "",
)
def test_model_that_cannot_be_patched(make, error, message):
    model = make()
    kind, attention = type(model), getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(error, match=message):
        patch(model, 3)
    assert type(model) is kind
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == attention


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefix": True}, TypeError, "expected prefix to be None, an int, .* got bool"),
        ({"prefix": 3.5}, TypeError, "got float"),
        ({"prefix": -1}, ValueError, "prefix >= 0 virtual tokens, got -1"),
        ({"backend": "tpu"}, ValueError, "backend to be one of auto, triton, .* got 'tpu'"),
        ({"backend": "missing"}, NotImplementedError, "backend that can run here, got 'missing': no such device"),
        ({"compute_dtype": torch.float64}, TypeError, "bfloat16 or torch.float16, got torch.float64"),
        ({"compute_dtype": "bf16"}, TypeError, "got bf16"),
        ({"prefix": PrefixConfig(3, sites=("encoder",))}, NotImplementedError, "sites=.*no encoder attention"),
    ],
)
def test_bad_arguments(arguments, error, message, monkeypatch):
    missing = dispatch.BackendInfo("missing", False, "no such device", "cuda")
    monkeypatch.setattr(dispatch, "NAMES", (*dispatch.NAMES, "missing"))
    monkeypatch.setattr(dispatch, "backends", lambda: [missing])
    model = make_model("gpt2")
    with pytest.raises(error, match=message):
        patch(model, **arguments)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="expected a model that patch returned, got GPT2LMHeadModel"):
        unpatch(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_layers=2, got one with num_layers=3"),
        ({"num_key_value_heads": 4}, "num_kv_heads=2, got one with num_kv_heads=4"),
        ({"head_dim": 16}, "head_dim=8, got one with head_dim=16"),
    ],
)
def test_prefix_made_for_another_model(changes, message, tmp_path):
    model, prefix = make_model("llama"), make_prefix(make_model("llama", **changes))
    with pytest.raises(ValueError, match=message):
        patch(model, prefix)
    prefix.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(changes)).replace("num_hidden", "num").split("_")[-1]):
        patch(model, tmp_path)
    assert not hasattr(model, "prefix")


def test_damaged_files(tmp_path):
    model = make_model("llama")
    make_prefix(model).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError):
        patch(model, tmp_path)
    weights.write_bytes(pickle.dumps({"prompt_embeddings": 0}))
    with pytest.raises(ValueError):
        patch(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises((ValueError, NotImplementedError), match="LORA"):
        patch(model, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions=False, got True"),
        ({"head_mask": torch.ones(2, 4)}, "expected no head_mask"),
        ({"input_ids": None}, "input_ids or inputs_embeds, got neither"),
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, r"labels \(3, 9\), one for each token, got \(3, 4\)"),
    ],
)
def test_refused_calls(arguments, message):
    model, batch = patch(make_model("gpt2"), 3).train(), make_batch("none")
    with pytest.raises(ValueError, match=message):
        model(**{**batch.arguments(), **arguments})


def test_label_outside_the_vocabulary():
    model, batch = patch(make_model("gpt2"), 3).train(), make_batch("none")
    labels = batch.labels.masked_fill(batch.labels == 7, 7)
    labels[0, -1] = 61
    with pytest.raises(ValueError, match="expected labels from 0 to 60, or -100 for none, got 61"):
        model(batch.input_ids, labels=labels)


def test_attention_implementation_cannot_be_changed():
    model = patch(make_model("llama"), 3)
    with pytest.raises(ValueError, match="got 'sdpa'; unpatch the model first"):
        model.set_attn_implementation("sdpa")


def test_config_that_asks_for_attention_weights():
    model, batch = make_model("llama"), make_batch("none")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        patch(model, 3)(batch.input_ids)


def test_reentrant_checkpointing():
    model, batch = patch(make_model("llama"), 3), make_batch("none")
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = UnmarkedCheckpoint()
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
        model(**batch.arguments())


class UnmarkedCheckpoint:
    """Reentrant checkpointing that no keyword shows."""

    def __call__(self, function, *args):
        from torch.utils.checkpoint import checkpoint

        return checkpoint(function, *args, use_reentrant=True)


def test_model_without_prefix_is_not_saved(tmp_path):
    model = patch(make_model("llama"), 0)
    with pytest.raises(ValueError, match="expected a prefix to save"):
        model.save_pretrained(tmp_path)


def test_peft_models_that_cannot_be_patched():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(make_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match="active adapter is prefix tuning or a cartridge, got LORA"):
        patch(lora)
    twice = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}
    with pytest.raises(NotImplementedError, match=r"got PeftModelForSeq2SeqLM.* use task_type CAUSAL_LM, SEQ_CLS"):
        patch(make_peft("gpt2", **twice))
    with pytest.raises(ValueError, match="neither prefix nor freeze=False for a PeftModel"):
        patch(make_peft("llama"), 4)
    with pytest.raises(ValueError, match="num_layers=2, got one with num_layers=1"):
        patch(make_peft("llama", num_layers=1))
    model = make_peft("gpt2")
    patch(model.base_model, 3)
    with pytest.raises(ValueError, match="around an unpatched model"):
        patch(model)
    patched = patch(make_peft("gpt2"))
    with pytest.raises(ValueError, match="the PeftModel around this patched model"):
        patch(patched.base_model, 3)
    with pytest.raises(ValueError, match="expected a model that patch returned"):
        unpatch(patched.base_model)


def test_quantised_looking_model_is_served():
    """Quantised layers change the linear modules only: what reaches the attention is in the compute dtype."""
    model, batch = make_model("llama", dtype=torch.bfloat16), make_batch("none")
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(is_compileable=False)
    patch(model, make_prefix(model))
    assert model(batch.input_ids).logits.dtype == torch.bfloat16
