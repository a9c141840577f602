"""Prefixes that start from a text or from a computed cache."""

import re
from typing import Any

import pytest
import torch
from prefix_inputs import FAMILIES, cache_of, logits_after, tiny_config, tiny_model
from transformers import (
    BartConfig,
    BartModel,
    DynamicCache,
    EncoderDecoderCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from prefix_fast.prefix import Geometry, Prefix, PrefixConfig

TEXT = "summarise the following table in one sentence"
ROW = torch.tensor([[5, 9, 13, 2]])


def tokenizer(text: str) -> dict[str, list[int]]:
    """One token a word."""
    return {"input_ids": [2 + sum(map(ord, word)) % 60 for word in text.split()]}


def random_pairs(layers: int = 2, shape: tuple[int, ...] = (1, 2, 5, 4)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(layers)]


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_after_a_text_prefix_is_the_row_after_the_text(family: str, projection: bool) -> None:
    model = tiny_model(family)
    tokens = tokenizer(TEXT)["input_ids"]
    prefix = Prefix.from_text(model, tokenizer, TEXT, PrefixConfig(len(tokens), projection))
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([tokens]), ROW], dim=1)).logits[:, len(tokens) :]
    torch.testing.assert_close(logits_after(model, prefix, ROW), expected, rtol=1e-4, atol=1e-5)
    prefix.check_fits(model.config)
    assert prefix.config.prefix_projection is projection


def test_text_without_a_config_sets_the_length_and_projects() -> None:
    prefix = Prefix.from_text(tiny_model("gpt2"), tokenizer, TEXT)
    assert prefix.config == PrefixConfig(num_virtual_tokens=7)


def test_text_start_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    first = Prefix.from_text(model, tokenizer, TEXT, PrefixConfig(7, False))
    second = Prefix.from_text(model, tokenizer, TEXT, PrefixConfig(7, False))
    assert [module.training for module in model.modules()] == modes
    # The model's dropout is off, so both are the same.
    torch.testing.assert_close(first()["decoder"], second()["decoder"], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_text_start_of_a_half_precision_model_is_float32() -> None:
    prefix = Prefix.from_text(tiny_model("llama-gqa", torch.bfloat16), tokenizer, TEXT)
    assert {tensor.dtype for tensor in prefix.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "num_virtual_tokens", "error", "message"),
    [
        (
            TEXT,
            5,
            ValueError,
            "num_virtual_tokens=5 tokens, got 7 tokens; shorten the text, or set num_virtual_tokens=7",
        ),
        (TEXT, 10, ValueError, "num_virtual_tokens=10 tokens, got 7 tokens; lengthen or repeat the text"),
        ("", None, ValueError, "text with at least one token, got none"),
        ("word " * 65, None, ValueError, "at most 64 tokens, the model's positions, got 65; shorten the text"),
        (["two", "texts"], None, TypeError, "text to be a str, got list"),
    ],
    ids=["longer", "shorter", "empty", "beyond-the-table", "list"],
)
def test_text_that_cannot_start_a_prefix_is_refused(
    text: Any, num_virtual_tokens: int | None, error: type[Exception], message: str
) -> None:
    config = None if num_virtual_tokens is None else PrefixConfig(num_virtual_tokens)
    with pytest.raises(error, match=re.escape(message)):
        Prefix.from_text(tiny_model("gpt2"), tokenizer, text, config)


def test_text_start_with_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="below the model's vocabulary size 64, got 3 … 64; pass the model's own"):
        Prefix.from_text(tiny_model("gpt2"), lambda text: {"input_ids": [3, 64]}, TEXT)


def test_text_start_of_an_encoder_decoder_is_refused() -> None:
    model = BartModel(
        BartConfig(
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            vocab_size=64,
        )
    )
    with pytest.raises(NotImplementedError, match="got bart: it is an encoder-decoder"):
        Prefix.from_text(model, tokenizer, TEXT)


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "legacy", "two equal rows"])
def test_cache_becomes_the_prefix_it_holds(family: str, kind: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    cache = StaticCache(config=model.config, max_cache_len=12) if kind == "static" else DynamicCache()
    rows = 2 if kind == "two equal rows" else 1
    # With gradients: the cache has a graph, which the prefix must not keep.
    past = model(ids.expand(rows, -1), past_key_values=cache, use_cache=True).past_key_values
    if kind == "legacy":
        past = tuple((layer.keys, layer.values) for layer in past.layers)
    prefix = Prefix.from_cache(past)
    assert prefix.num_virtual_tokens == 5 and not prefix.config.prefix_projection
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in prefix.parameters())
    with torch.no_grad():
        expected = model(torch.cat([ids, ROW], dim=1)).logits[:, 5:]
    torch.testing.assert_close(logits_after(model, prefix, ROW), expected, rtol=1e-4, atol=1e-5)


def test_cache_is_copied_to_float32() -> None:
    pairs = [(key.bfloat16(), value.bfloat16()) for key, value in random_pairs()]
    prefix = Prefix.from_cache(pairs)
    expected = torch.stack([key for key, _ in pairs]).float()
    for key, value in pairs:
        key.zero_(), value.zero_()
    torch.testing.assert_close(prefix()["decoder"][0], expected, rtol=0, atol=0)


def test_cache_of_a_prefix_is_that_prefix() -> None:
    prefix = Prefix(PrefixConfig(4), Geometry(2, 2, 8))
    torch.testing.assert_close(Prefix.from_cache(cache_of(prefix))()["decoder"], prefix()["decoder"], rtol=0, atol=0)


def test_cache_within_its_window_is_whole_and_beyond_it_refused() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    short, long = (model(torch.arange(n)[None], use_cache=True).past_key_values for n in (3, 9))
    assert Prefix.from_cache(short).num_virtual_tokens == 3
    with pytest.raises(ValueError, match=r"all 9 tokens in layer 0, got the last \d of a sliding window"):
        Prefix.from_cache(long)


def changed(**entries: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two layers, the second with another key or value."""
    pairs = random_pairs()
    pairs[1] = (entries.get("key", pairs[1][0]), entries.get("value", pairs[1][1]))
    return pairs


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        ((), ValueError, "at least one layer, got an empty cache"),
        (None, TypeError, "a transformers cache or a tuple of (key, value) pairs, got NoneType"),
        (torch.zeros(2, 1, 2, 5, 4), TypeError, "got Tensor; pass the model output's past_key_values"),
        ([torch.zeros(1, 2, 5, 4)], TypeError, "expected layer 0 to be a pair (key, value), got Tensor"),
        ([random_pairs()[0] * 2], NotImplementedError, "got 4 entries as in an encoder-decoder cache"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), NotImplementedError, "pass its self_attention_cache"),
        (StaticCache(config=tiny_config("gpt2"), max_cache_len=8), ValueError, "got none in layer 0; run the model"),
        (random_pairs(shape=(2, 2, 5, 4)), ValueError, "one row, or identical rows, got 2 different rows in layer 0"),
        (random_pairs(shape=(0, 2, 5, 4)), ValueError, "with B >= 1 in layer 0, got (0, 2, 5, 4)"),
        (random_pairs(shape=(2, 5, 4)), ValueError, "key [B, Hkv, P, D] with B >= 1 in layer 0, got (2, 5, 4)"),
        (changed(key=torch.zeros(1, 2, 5, 4, dtype=torch.int8)), TypeError, "key in layer 1, got torch.int8"),
        (changed(key=torch.zeros(1, 2, 6, 4)), ValueError, "in layer 1, got (1, 2, 6, 4) and (1, 2, 5, 4)"),
        (changed(value=torch.zeros(1, 2, 5, 6)), NotImplementedError, "value dim = key dim in layer 1, got 6 and 4"),
        (changed(value=torch.full((1, 2, 5, 4), torch.nan)), ValueError, "expected finite keys and values"),
        (random_pairs() + random_pairs(1, (1, 4, 5, 4)), NotImplementedError, "in [(2, 4), (4, 4)]; prefixes"),
        (random_pairs() + random_pairs(1, (1, 2, 6, 4)), ValueError, "layers with equally many tokens, got [5, 6]"),
    ],
)  # fmt: skip
def test_cache_that_is_no_prefix_is_refused(cache: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="Prefix.from_cache: .*" + re.escape(message)):
        Prefix.from_cache(cache)
