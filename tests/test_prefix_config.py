"""What PrefixConfig accepts, and the geometry read from model configs."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from prefix_inputs import FAMILIES, tiny_config
from transformers import (
    DeepseekV3Config,
    EncoderDecoderConfig,
    Gemma3nTextConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    MambaConfig,
)

from prefix_fast.prefix import Geometry, Prefix, PrefixConfig, model_geometry


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_that_of_the_models_cache(family: str) -> None:
    model_class, config, expected = FAMILIES[family]
    cache = model_class(config).eval()(torch.tensor([[2, 3, 4]]), use_cache=True).past_key_values
    geometry = model_geometry(config)
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim) == expected
    assert len(cache.layers) == geometry.num_layers
    assert cache.layers[1].keys.shape == (1, geometry.num_kv_heads, 3, geometry.head_dim)


def test_geometry_of_multi_query_has_one_head() -> None:
    assert model_geometry(GPTBigCodeConfig(n_layer=2, n_head=4, n_embd=32)) == Geometry(2, 1, 8)


def test_geometry_of_layers_that_differ_only_elsewhere_is_the_common_one() -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, per_layer_config={1: {"intermediate_size": 64}}
    )
    assert model_geometry(config) == Geometry(2, 4, 8)


def test_geometry_of_a_geometry_is_itself() -> None:
    geometry = Geometry(2, 3, 4)
    assert model_geometry(geometry) is geometry


def test_sizes_from_other_integer_types_become_ints() -> None:
    config = PrefixConfig(num_virtual_tokens=torch.tensor(7), encoder_hidden_size=torch.tensor(3))  # type: ignore[arg-type]
    assert (type(config.num_virtual_tokens), config.num_virtual_tokens) == (int, 7)


def test_sites_default_to_the_models_own() -> None:
    prefix = Prefix(PrefixConfig(num_virtual_tokens=2), tiny_config("gpt2"))
    named = Prefix(PrefixConfig(num_virtual_tokens=2, sites=["decoder"]), tiny_config("gpt2"))  # type: ignore[arg-type]
    assert list(prefix()) == list(named()) == ["decoder"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_virtual_tokens": -1}, ValueError, r"expected num_virtual_tokens >= 0, got -1; "),
        ({"num_virtual_tokens": 2.0}, TypeError, r"num_virtual_tokens to be an integer, got 2\.0 \(float\); "),
        ({"num_virtual_tokens": True}, TypeError, r"num_virtual_tokens to be an integer, got True \(bool\)"),
        ({"num_virtual_tokens": "10"}, TypeError, r"num_virtual_tokens to be an integer, got '10' \(str\)"),
        ({"encoder_hidden_size": 0}, ValueError, r"expected encoder_hidden_size >= 1, got 0"),
        ({"prefix_projection": 1}, TypeError, r"prefix_projection to be a bool, got 1"),
        ({"prefix_dropout": 1.0}, ValueError, r"0 <= prefix_dropout < 1, got 1\.0"),
        ({"prefix_dropout": -0.1}, ValueError, r"0 <= prefix_dropout < 1, got -0\.1"),
        ({"prefix_dropout": float("nan")}, ValueError, r"0 <= prefix_dropout < 1, got nan"),
        ({"prefix_dropout": "0.1"}, TypeError, r"prefix_dropout to be a number, got '0\.1' \(str\)"),
        ({"sites": ("decoder", "middle")}, ValueError, r"different names of .*got \('decoder', 'middle'\)"),
        ({"sites": ("decoder", "decoder")}, ValueError, r"sites to be different names"),
        ({"sites": ()}, ValueError, r"sites to be different names"),
        ({"sites": "decoder"}, TypeError, r"sites to be a sequence of names, got 'decoder'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_config_out_of_range_is_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"PrefixConfig: .*{message}"):
        PrefixConfig(**fields)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrefixConfig().num_virtual_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            EncoderDecoderConfig(encoder={"model_type": "bert"}, decoder={"model_type": "gpt2"}),
            NotImplementedError,
            "names d_model",
        ),
        (DeepseekV3Config(), NotImplementedError, r"compresses its keys and values \(kv_lora_rank\)"),
        (Gemma3nTextConfig(), NotImplementedError, "read another layer's keys and values"),
        (MambaConfig(), NotImplementedError, "without an ordinary key/value cache"),
        (
            LlamaConfig(num_hidden_layers=2, per_layer_config={1: {"num_key_value_heads": 8}}),
            NotImplementedError,
            r"layers of one shape, got llama with \(num_kv_heads, head_dim\) in \[\(8, 128\), \(32, 128\)\]",
        ),
        ({"num_hidden_layers": 2}, TypeError, "expected a transformers config or a Geometry, got dict"),
        ("gpt2", TypeError, "expected a transformers config or a Geometry, got str"),
        (None, TypeError, "expected a transformers config or a Geometry, got NoneType"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_model_without_a_common_cache_is_refused(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Prefix(PrefixConfig(), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5, "head_dim": None}, "multiple of num_key_value_heads, got 5 and 2"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size to be a multiple of num_attention_heads, got 30 and 4"),
        ({"num_hidden_layers": 0}, "expected num_layers >= 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_model_config_with_impossible_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_config("llama-gqa")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        model_geometry(config)


@pytest.mark.parametrize("sites", [("encoder",), ("decoder", "cross")], ids="-".join)
def test_site_that_the_model_lacks_is_refused(sites: tuple[str, ...]) -> None:
    with pytest.raises(NotImplementedError, match=r"decoder-only model, .*it has no (encoder|cross) attention"):
        Prefix(PrefixConfig(sites=sites), tiny_config("gpt2"))


def test_config_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="config to be a PrefixConfig, got int; pass PrefixConfig"):
        Prefix(5, tiny_config("gpt2"))  # type: ignore[arg-type]


def test_check_fits_names_all_that_differs() -> None:
    prefix = Prefix(PrefixConfig(2, prefix_projection=False), Geometry(3, 4, 16))
    prefix.check_fits(Geometry(3, 4, 16))
    message = "a model with num_layers=2, head_dim=8, got one with num_layers=3, head_dim=16; use the model"
    with pytest.raises(ValueError, match=message):
        prefix.check_fits(tiny_config("gpt2"))
