"""Prefixes of `adapters`, of the original code and of PEFT, read, used and written in each other's formats."""

import json

import pytest
import torch
from models_zoo import assert_close, make_batch, make_model, make_prefix, twin
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix, reference
from torch import nn
from typer.testing import CliRunner

from prefix_fast.bank import PrefixBank
from prefix_fast.conversion import ORIGINAL_FILE, convert
from prefix_fast.geometry import model_sites
from prefix_fast.patching import patch
from prefix_fast.prefix import Prefix, PrefixConfig

P, HIDDEN, MLP = 4, 32, 6
LOCATIONS = {"decoder": "self_prefix", "encoder": "encoder_prefix", "cross": "cross_prefix"}


class AdaptersPrefix(nn.Module):
    """One site's parameters as `adapters` has them, and what it gives the attention: [2 · L, 1, Hkv, P, D]."""

    def __init__(self, geometry, flat, activation):
        super().__init__()
        self.geometry = geometry
        if flat:
            self.control_trans = nn.Parameter(torch.randn(P * geometry.flat_dim))
        else:
            self.wte = nn.Embedding(P, HIDDEN)
            layers = nn.Linear(HIDDEN, MLP), getattr(nn, activation)(), nn.Linear(MLP, geometry.flat_dim)
            self.control_trans = nn.Sequential(*layers)

    def states(self):
        flat = self.control_trans if hasattr(self, "wte") is False else self.control_trans(self.wte(torch.arange(P)))
        g = self.geometry
        return flat.view(1, P, g.num_layers * 2, g.num_kv_heads, g.head_dim).permute(2, 0, 3, 1, 4)


def save_adapter(folder, model, sites=("decoder",), flat=False, activation="Tanh", pickled=False, **changes):
    """Write a folder as `adapters` does; returns the modules by site."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    offered = model_sites(model.config).geometries
    modules = {site: AdaptersPrefix(offered[site], flat, activation) for site in sites}
    tensors = {
        f"transformer.prefix_tuning.prefix_tunings.task.{LOCATIONS[site]}.{name}": tensor.clone()
        for site, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    config = {"architecture": "prefix_tuning", "flat": flat, "prefix_length": P, "bottleneck_size": MLP}
    config.update(non_linearity=activation.lower(), use_gating=False, leave_out=[], **changes)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"config": config, "name": "task", "version": "1.2.0"}))
    if pickled:
        torch.save(tensors, folder / "pytorch_adapter.bin")
    else:
        save_file(tensors, folder / "adapter.safetensors")
    return modules


@pytest.mark.parametrize(
    ("flat", "activation", "pickled"), [(False, "Tanh", False), (False, "ReLU", True), (True, "Tanh", True)]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix_of_adapters(family, flat, activation, pickled, tmp_path):
    model = make_model(family)
    module = save_adapter(tmp_path / "a", model, flat=flat, activation=activation, pickled=pickled)["decoder"]
    prefix = Prefix.from_adapters(tmp_path / "a", model.config)
    keys, values = prefix()["decoder"]
    for layer in range(keys.shape[0]):
        assert_close(keys[layer], module.states()[2 * layer], 1e-6)
        assert_close(values[layer], module.states()[2 * layer + 1], 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_stay_where_they_are_in_training_and_generation(family, tmp_path):
    model, batch = make_model(family), make_batch("none")
    save_adapter(tmp_path / "a", model)
    prefix = Prefix.from_adapters(tmp_path / "a", model.config)
    shifted = Prefix(prefix.config, model.config, start=prefix._folded())
    positions = torch.arange(batch.input_ids.shape[1])[None] - P
    expected = patch(twin(model), shifted)(batch.input_ids, position_ids=positions).logits
    patch(model, prefix)
    assert_close(model(batch.input_ids).logits, expected)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    tokens = model.generate(batch.input_ids, **options)
    for count in range(batch.input_ids.shape[1], tokens.shape[1]):
        assert torch.equal(model(tokens[:, :count]).logits[:, -1].argmax(-1), tokens[:, count])


def test_sites_of_an_encoder_decoder(tmp_path):
    model, batch = make_seq2seq("bart"), make_seq2seq_batch("right")
    save_adapter(tmp_path / "a", model, sites=("encoder", "cross"))
    prefix = Prefix.from_adapters(tmp_path / "a", model.config)
    assert set(prefix()) == {"encoder", "cross"}
    expected = reference(twin(model), prefix)(**batch.arguments()).logits
    assert_close(patch(model, prefix)(**batch.arguments()).logits, expected, 1e-5)


def test_a_prefix_that_does_not_shift_keeps_that(tmp_path):
    model = make_model("gpt2")
    save_adapter(tmp_path / "a", model)
    prefix = Prefix.from_adapters(tmp_path / "a", model.config)
    assert not prefix.fold().shifts_positions
    with pytest.raises(NotImplementedError, match="leaves the tokens' positions where they are"):
        prefix.save_pretrained(tmp_path / "peft", format="peft")
    prefix.save_pretrained(tmp_path / "saved")
    again = Prefix.from_pretrained(tmp_path / "saved", model_config=model.config)
    assert not again.shifts_positions and torch.equal(again()["decoder"][0], prefix()["decoder"][0])
    with pytest.raises(ValueError, match="prefixes that shift positions, got 'a'"):
        PrefixBank({"a": prefix})
    t5 = make_seq2seq("t5")
    save_adapter(tmp_path / "t5", t5)
    with pytest.raises(NotImplementedError, match="a bias by distance"):
        patch(t5, Prefix.from_adapters(tmp_path / "t5", t5.config))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "lora"}, ValueError, "architecture prefix_tuning, got 'lora'"),
        ({"prefix_length": 0}, ValueError, "prefix_length >= 1, got 0"),
        ({"prefix_length": P + 1}, ValueError, "got 1024; use the model that the adapter was trained for|expected 5"),
        ({"use_gating": True}, NotImplementedError, "without gates, got use_gating"),
        ({"leave_out": [0]}, NotImplementedError, "got leave_out"),
        ({"non_linearity": "gelu_new"}, NotImplementedError, "non_linearity tanh or relu, got 'gelu_new'"),
    ],
)
def test_adapters_that_cannot_be_read(changes, error, message, tmp_path):
    model = make_model("gpt2")
    save_adapter(tmp_path / "a", model)
    file = tmp_path / "a" / "adapter_config.json"
    held = json.loads(file.read_text())
    held["config"].update(changes)
    file.write_text(json.dumps(held))
    with pytest.raises(error, match=message):
        Prefix.from_adapters(tmp_path / "a", model.config)


def test_damaged_adapters_are_named(tmp_path):
    model = make_model("gpt2")
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json"):
        Prefix.from_adapters(tmp_path, model.config)
    save_adapter(tmp_path / "a", model)
    weights = tmp_path / "a" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        Prefix.from_adapters(tmp_path / "a", model.config)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="got neither"):
        Prefix.from_adapters(tmp_path / "a", model.config)
    save_adapter(tmp_path / "b", make_seq2seq("bart"), sites=("encoder", "cross"))
    with pytest.raises(ValueError, match=r"prefixes at \['decoder'\], got \['cross', 'encoder'\]"):
        Prefix.from_adapters(tmp_path / "b", model.config)


def test_convert_between_every_format(tmp_path):
    model = make_model("gpt2")
    torch.manual_seed(1)
    trained = Prefix(PrefixConfig(P, encoder_hidden_size=MLP), model.config)
    torch.save(trained.original_state_dict(), tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", tmp_path / "peft", "peft", model.config)
    convert(tmp_path / "peft", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "peft", model.config)
    convert(tmp_path / "weights.pt", tmp_path / "original", "original", model.config)
    save_adapter(tmp_path / "a", model)
    convert(tmp_path / "a", tmp_path / "from_adapters", "native", model.config)
    expected = trained()["decoder"]
    for name in ("peft", "native", "again"):
        found = Prefix.from_pretrained(tmp_path / name)()["decoder"]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    kept = torch.load(tmp_path / "original" / ORIGINAL_FILE, weights_only=True)
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained.original_state_dict().items())


def test_convert_refuses_and_leaves_nothing(tmp_path):
    model = make_model("gpt2")
    make_prefix(model, P).save_pretrained(tmp_path / "direct")
    (tmp_path / "garbage.pt").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    save_adapter(tmp_path / "a", model)
    bart = make_seq2seq("bart")
    make_site_prefix(bart, P).save_pretrained(tmp_path / "bart")
    out, config = tmp_path / "out", model.config
    for source, to, given, error, message in [
        ("direct", "onnx", None, ValueError, "peft, native, original, got 'onnx'"),
        ("direct", "original", None, NotImplementedError, "a reparametrised prefix"),
        ("a", "native", None, ValueError, "expected the model that .* is for"),
        ("a", "peft", config, NotImplementedError, "leaves the tokens' positions"),
        ("nothing.pt", "peft", config, FileNotFoundError, "which is not there"),
        ("garbage.pt", "peft", config, ValueError, "cannot be read"),
        ("list.pt", "peft", config, ValueError, "tensors by name"),
        ("bart", "peft", None, NotImplementedError, "PEFT has them at the decoder's self-attention alone"),
        ("bart", "native", config, ValueError, "expected a prefix for a decoder-only model"),
    ]:
        with pytest.raises(error, match=message):
            convert(tmp_path / source, out, to, given)
        assert not out.exists()


def test_convert_on_the_command_line(tmp_path):
    from prefix_fast.cli import app

    model = make_model("gpt2")
    make_prefix(model, P).save_pretrained(tmp_path / "ours")
    model.config.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "native", "--model", str(tmp_path / "model")]
    done = CliRunner().invoke(app, ["convert", *arguments])
    assert done.exit_code == 0 and "4 virtual tokens" in done.output
    assert (tmp_path / "out" / "prefix.safetensors").is_file()
    failed = CliRunner().invoke(app, ["convert", str(tmp_path / "nowhere"), str(tmp_path / "out2")])
    assert failed.exit_code == 2
