"""Tiny models with random weights, one per family, and batches for them."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB = 61
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _config(family: str, **changes: Any) -> Any:
    import transformers as hf

    llama = {
        **_COMMON,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    gpt2 = {
        **_COMMON,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "initializer_range": 0.2,
    }
    opt = {
        **_COMMON,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "init_std": 0.2,
    }
    neox = {**llama, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    neox.pop("num_key_value_heads")
    builders = {
        "gpt2": lambda: hf.GPT2Config(**{**gpt2, **changes}),
        "llama": lambda: hf.LlamaConfig(**{**llama, **changes}),
        "qwen3": lambda: hf.Qwen3Config(**{**llama, "head_dim": 16, **changes}),
        "opt": lambda: hf.OPTConfig(**{**opt, **changes}),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**{**neox, **changes}),
        "mistral": lambda: hf.MistralConfig(**{**llama, "sliding_window": 6, **changes}),
        "gemma2": lambda: hf.Gemma2Config(
            **{
                **llama,
                "head_dim": 8,
                "sliding_window": 6,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                "query_pre_attn_scalar": 8,
                **changes,
            }
        ),
        "gpt_oss": lambda: hf.GptOssConfig(
            **{**llama, "head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1, **changes}
        ),
        "granite": lambda: hf.GraniteConfig(**{**llama, "logits_scaling": 4.0, "attention_multiplier": 0.3, **changes}),
    }
    return builders[family]()


FAMILIES = ("gpt2", "llama", "qwen3", "opt", "gpt_neox")
WITH_EXTRAS = ("mistral", "gemma2", "gpt_oss", "granite")


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model in evaluation mode, with a config of its own."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, **changes)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "sinks")):
            torch.nn.init.normal_(parameter.data, mean=float(name.endswith("norm.weight")), std=0.2)
    return model


def make_peft(
    family: str = "gpt2", dtype: torch.dtype = torch.float32, changes: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A PeftModel with prefix tuning of 5 virtual tokens around a tiny model."""
    from peft import PrefixTuningConfig, get_peft_model

    model = make_model(family, dtype=dtype, **(changes or {}))
    options = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM", **options}
    if options.get("prefix_projection"):
        options.setdefault("encoder_hidden_size", 16)
    torch.manual_seed(0)
    return get_peft_model(model, PrefixTuningConfig(**options))


def twin(model: Any) -> Any:
    """A copy that shares nothing with the model, its config included."""
    return copy.deepcopy(model)


class Batch(NamedTuple):
    """Token ids, padding mask and labels, [B, T] each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """As keywords of a forward."""
        return self._asdict()

    def computed(self) -> Tensor:
        """[B, T] the positions that a training call computes: attended to, or predicting a label."""
        predicts = torch.nn.functional.pad(self.labels[:, 1:] != -100, (0, 1))
        return self.attention_mask.bool() | predicts


def make_batch(padding: str = "left", rows: int = 3, tokens: int = 9, seed: int = 0) -> Batch:
    """A batch with padding "left", "right" or "none"; padded positions and some others carry no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        width = 2 * row if padding != "none" else 0
        if padding == "left":
            mask[row, :width] = 0
        elif width:
            mask[row, -width:] = 0
    ids = ids.masked_fill(mask == 0, 2)
    labels = ids.masked_fill(mask == 0, -100)
    # The first token of a row is predicted from a padded position when the padding is on the left.
    labels[0, : tokens // 2] = -100
    return Batch(ids, mask, labels)


def random_states(model: Any, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values of a prefix for the model, [L, Hkv, P, D] each."""
    from prefix_fast.geometry import model_geometry

    shape = model_geometry(model.config)
    generator = torch.Generator().manual_seed(seed)
    size = (2, shape.num_layers, shape.num_kv_heads, length, shape.head_dim)
    keys, values = torch.randn(size, generator=generator).unbind(0)
    return keys, values


def make_prefix(model: Any, length: int = 5, seed: int = 1) -> Any:
    """A direct prefix with random keys and values."""
    from prefix_fast.prefix import Prefix, PrefixConfig

    config = PrefixConfig(num_virtual_tokens=length, prefix_projection=False)
    return Prefix(config, model.config, start={"decoder": random_states(model, length, seed)})


def cache_with(keys: Tensor, values: Tensor, rows: int, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own cache that holds the prefix [L, Hkv, P, D] for every row; gradients flow into it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(keys.shape[0]):
        repeated = [tensor[layer].to(dtype).unsqueeze(0).expand(rows, -1, -1, -1) for tensor in (keys, values)]
        cache.update(*repeated, layer)
    return cache


def with_prefix_mask(mask: Tensor, length: int) -> Tensor:
    """The padding mask with `length` ones before it."""
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    """Largest error below `relative` times the largest expected value."""
    scale = float(expected.detach().abs().max())
    error = float((found.detach() - expected.detach()).abs().max())
    assert error <= relative * scale + 1e-6, f"error {error:.3g} where the largest value is {scale:.3g}"
