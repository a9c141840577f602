"""Prefix files and PEFT's: each reads what the other writes, with the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from prefix_inputs import FAMILIES, logits_after, tiny_model
from safetensors import safe_open
from torch import Tensor

from prefix_fast.prefix import Prefix, PrefixConfig

# Raised inside transformers when PEFT asks a model for its gradient checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROW = torch.tensor([[5, 9, 13, 2]])
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def peft_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROW, attention_mask=torch.ones_like(ROW)).logits


def peft_model(family: str, projection: bool, **fields: Any) -> Any:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=6,
        prefix_projection=projection,
        encoder_hidden_size=10 if projection else None,
        **fields,
    )
    return get_peft_model(tiny_model(family), config)


def peft_keys_values(model: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [L, 1, Hkv, P, D] that PEFT hands its model."""
    with torch.no_grad():
        layers = model.get_prompt(1).layers
    return torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers])


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
@FAMILY
def test_peft_reads_our_files_with_the_same_logits(family: str, projection: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    prefix = Prefix(PrefixConfig(6, projection, encoder_hidden_size=10), model.config)
    expected = logits_after(model, prefix, ROW)
    prefix.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(peft_logits(loaded), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(peft_keys_values(loaded), prefix()["decoder"], rtol=0, atol=0)


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
@FAMILY
def test_our_prefix_from_pefts_files_has_the_same_keys_and_values(
    family: str, projection: bool, tmp_path: Path
) -> None:
    model = peft_model(family, projection)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ROW, attention_mask=torch.ones_like(ROW), labels=ROW).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    prefix = Prefix.from_pretrained(tmp_path, model_config=model.get_base_model().config)
    torch.testing.assert_close(prefix()["decoder"], peft_keys_values(model), rtol=0, atol=0)
    assert prefix.config == PrefixConfig(6, False, encoder_hidden_size=10 if projection else prefix.geometry.token_dim)
    base = model.get_base_model()
    torch.testing.assert_close(logits_after(base, prefix, ROW), peft_logits(model), rtol=1e-5, atol=1e-6)


@FAMILY
def test_files_are_those_that_peft_writes(family: str, tmp_path: Path) -> None:
    model = peft_model(family, False)
    model.save_pretrained(tmp_path / "peft")
    Prefix.from_pretrained(tmp_path / "peft").save_pretrained(tmp_path / "ours")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "peft")]
    # Which PEFT wrote a file is PEFT's to say.
    assert all(config.pop("peft_version", None) or True for config in configs)
    assert configs[0] == configs[1]


def test_base_model_name_goes_both_ways(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config._name_or_path = "some/model"
    Prefix(PrefixConfig(2), model.config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    assert Prefix.from_pretrained(tmp_path).base_model_name == "some/model"


def test_cartridge_loads_as_a_direct_prefix(tmp_path: Path) -> None:
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, num_frozen_tokens=2)
    model = get_peft_model(tiny_model("llama-gqa"), config).eval()
    model.save_pretrained(tmp_path)
    prefix = Prefix.from_pretrained(tmp_path)
    torch.testing.assert_close(prefix()["decoder"], peft_keys_values(model), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in prefix.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_dtypes_load_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft_model("gpt2", False)
    model.prompt_encoder.to(dtype)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as archive:
        stored = archive.get_tensor("prompt_embeddings")
    assert stored.dtype == dtype
    prefix = Prefix.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in prefix.state_dict().values()} == {torch.float32}
    keys = stored.float().view(6, 2, 2, 4, 8)[:, :, 0].permute(1, 2, 0, 3)
    torch.testing.assert_close(prefix.state_dict()["sites.decoder.keys"], keys, rtol=0, atol=0)


def test_empty_prefix_is_no_prefix_in_peft(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        expected = model(ROW).logits
    Prefix(PrefixConfig(0), model.config).save_pretrained(tmp_path)
    assert Prefix.from_pretrained(tmp_path).num_virtual_tokens == 0
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(peft_logits(loaded), expected, rtol=1e-5, atol=1e-6)


def test_prefix_of_another_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    peft_model("gpt2", False).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"never read")
    with pytest.raises(
        ValueError, match=r"Prefix.from_pretrained: .* with num_kv_heads=2, got one with num_kv_heads=4"
    ):
        Prefix.from_pretrained(tmp_path, model_config=tiny_model("llama-gqa").config)


def test_other_adapters_and_further_modules_are_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_model("gpt2"), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PREFIX_TUNING, CARTRIDGE, got 'LORA'; load that adapter with peft"):
        Prefix.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a folder without another adapter, got a LORA adapter"):
        Prefix(PrefixConfig(2), tiny_model("gpt2").config).save_pretrained(tmp_path)
    peft_model("gpt2", False, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="adapters with further trained modules, with peft"):
        Prefix.from_pretrained(tmp_path / "head")
