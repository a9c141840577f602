"""A tiny random causal language model with a real tokenizer, saved in a folder, and small data files."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAIRS = [(f"name[place {i}], area[{a}]", f"Place {i} is by the {a}.") for i in range(12) for a in ("river", "park")]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words: every text can be encoded, eos and pad exist."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two Llama layers with grouped heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_model(folder: Path) -> Path:
    """Model and tokenizer in `folder`."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pairs(path: Path) -> Path:
    """The pairs as a .jsonl file with the columns facts and text."""
    return write_jsonl(path, [{"facts": source, "text": target} for source, target in PAIRS])
