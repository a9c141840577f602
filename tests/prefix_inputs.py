"""Tiny random models of each family, and a cache made of a prefix, for the tests of prefixes and checkpoints."""

import copy
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefix_fast.prefix import Prefix

TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, **TOKENS}
GQA = {"intermediate_size": 48, "num_key_value_heads": 2}

# family → (model class, its config, (num_layers, num_kv_heads, head_dim))
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64, **TOKENS), (2, 4, 8)),
    "llama-gqa": (LlamaForCausalLM, LlamaConfig(**SIZES, **GQA), (2, 2, 8)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, **GQA, head_dim=16), (2, 2, 16)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1, do_layer_norm_before=True),
        (2, 4, 8),
    ),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, intermediate_size=48), (2, 4, 8)),
}


def tiny_config(family: str) -> Any:
    """A config that no other model shares."""
    return copy.deepcopy(FAMILIES[family][1])


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in evaluation mode."""
    return FAMILIES[family][0](tiny_config(family)).eval().to(dtype)


def cache_of(prefix: Prefix) -> DynamicCache:
    """The prefix as a cache of one row."""
    with torch.no_grad():
        keys, values = prefix()["decoder"]
    return DynamicCache([(key, value) for key, value in zip(keys, values, strict=True)])


def logits_after(model: Any, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one row of ids that follows the prefix in the model's own cache."""
    mask = torch.ones(1, prefix.num_virtual_tokens + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache_of(prefix), attention_mask=mask).logits
