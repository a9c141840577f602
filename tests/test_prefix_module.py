"""Prefix: the function that PEFT's encoder is, its parameters, dtype, copies and gradients."""

import copy
import pickle

import pytest
import torch
from peft import PrefixEncoder, PrefixTuningConfig
from prefix_inputs import tiny_config
from torch import Tensor, nn

from prefix_fast.prefix import Geometry, Prefix, PrefixConfig

GEOMETRY = Geometry(num_layers=3, num_kv_heads=2, head_dim=4)
KINDS = pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])


def make(projection: bool, num_virtual_tokens: int = 5, **fields: float) -> Prefix:
    config = PrefixConfig(num_virtual_tokens, projection, encoder_hidden_size=7, **fields)  # type: ignore[arg-type]
    return Prefix(config, GEOMETRY)


def started(num_virtual_tokens: int = 5, **fields: float) -> tuple[Prefix, tuple[Tensor, Tensor]]:
    start = (torch.randn(3, 2, num_virtual_tokens, 4), torch.randn(3, 2, num_virtual_tokens, 4))
    config = PrefixConfig(num_virtual_tokens, True, encoder_hidden_size=7, **fields)  # type: ignore[arg-type]
    return Prefix(config, GEOMETRY, start={"decoder": start}), start


def peft_encoder(projection: bool) -> PrefixEncoder:
    return PrefixEncoder(
        PrefixTuningConfig(
            num_virtual_tokens=5,
            token_dim=8,
            num_layers=3,
            num_attention_heads=2,
            encoder_hidden_size=7,
            prefix_projection=projection,
        )
    )


def peft_prompt(encoder: PrefixEncoder) -> tuple[Tensor, Tensor]:
    """Keys and values [L, 1, Hkv, P, D], by the view and permutation of PeftModel.get_prompt."""
    flat = encoder(torch.arange(5)[None])
    layers = flat.view(1, 5, 6, 2, 4).permute([2, 0, 3, 1, 4]).split(2)
    return torch.stack([layer[0] for layer in layers]), torch.stack([layer[1] for layer in layers])


@KINDS
def test_prefix_of_a_seed_is_pefts_of_that_seed(projection: bool) -> None:
    torch.manual_seed(3)
    expected = peft_prompt(peft_encoder(projection))
    torch.manual_seed(3)
    torch.testing.assert_close(make(projection)()["decoder"], expected, rtol=0, atol=0)


def test_prefix_with_pefts_weights_is_pefts_function_and_gradient() -> None:
    encoder, prefix = peft_encoder(True), make(True)
    prefix.sites["decoder"].load_state_dict(encoder.state_dict())
    ours, theirs = prefix()["decoder"], peft_prompt(encoder)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    weights = [torch.randn_like(tensor) for tensor in ours]
    for keys_values in (ours, theirs):
        sum((w * x).sum() for w, x in zip(weights, keys_values, strict=True)).backward()
    for (name, parameter), (other_name, other) in zip(
        prefix.sites["decoder"].named_parameters(), encoder.named_parameters(), strict=True
    ):
        assert name == other_name
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("num_virtual_tokens", [0, 1, 17], ids=lambda p: f"P{p}")
@KINDS
def test_shapes_and_last_dim(projection: bool, num_virtual_tokens: int) -> None:
    for tensor in make(projection, num_virtual_tokens)()["decoder"]:
        assert tensor.shape == (3, 1, 2, num_virtual_tokens, 4)
        assert tensor.dtype == torch.float32 and tensor.requires_grad and tensor.stride(-1) == 1


def test_reading_a_prefix_copies_nothing() -> None:
    direct, projected = make(False), make(True)
    keys, values = direct()["decoder"]
    assert keys.data_ptr() == direct.sites["decoder"].keys.data_ptr()
    assert values.data_ptr() == direct.sites["decoder"].values.data_ptr()
    keys, values = projected()["decoder"]
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


@KINDS
def test_gradient_through_unbound_layers_is_that_of_the_whole(projection: bool) -> None:
    prefix = make(projection)
    weight = torch.randn(3, 1, 2, 5, 4)

    def gradients(by_layer: bool) -> list[Tensor | None]:
        prefix.zero_grad()
        keys, values = prefix()["decoder"]
        if by_layer:
            loss = sum((w * k * v).sum() for w, k, v in zip(weight, keys.unbind(0), values.unbind(0), strict=True))
        else:
            loss = (weight * keys * values).sum()
        loss.backward()
        return [parameter.grad.clone() for parameter in prefix.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_state_dict_keys_are_stable() -> None:
    assert list(make(False).state_dict()) == ["sites.decoder.keys", "sites.decoder.values"]
    projected = [
        "sites.decoder.embedding.weight",
        "sites.decoder.transform.0.weight",
        "sites.decoder.transform.0.bias",
        "sites.decoder.transform.2.weight",
        "sites.decoder.transform.2.bias",
    ]
    assert list(make(True).state_dict()) == projected
    prefix, _ = started()
    assert sorted(prefix.state_dict()) == sorted([*projected, "sites.decoder.base_keys", "sites.decoder.base_values"])
    assert [name for name, _ in prefix.named_parameters()] == projected


@KINDS
def test_fold_keeps_keys_and_values_and_shares_nothing(projection: bool) -> None:
    prefix = make(projection, prefix_dropout=0.5)
    folded = prefix.fold()
    assert not folded.config.prefix_projection and folded.config.num_virtual_tokens == 5
    expected = tuple(tensor.clone() for tensor in prefix.eval()()["decoder"])
    torch.testing.assert_close(folded.eval()()["decoder"], expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.add_(1)
    torch.testing.assert_close(prefix()["decoder"], expected, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in folded.parameters())


def test_fold_is_float32_under_autocast() -> None:
    prefix = make(True)
    expected = prefix()["decoder"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prefix()["decoder"][0].dtype == torch.bfloat16
        folded = prefix.fold()
    torch.testing.assert_close(folded()["decoder"], expected, rtol=0, atol=0)


def test_projection_with_a_start_begins_as_the_start_and_learns() -> None:
    prefix, (keys, values) = started()
    torch.testing.assert_close(prefix()["decoder"], (keys.unsqueeze(1), values.unsqueeze(1)), rtol=0, atol=0)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(tensor.square().sum() for tensor in prefix()["decoder"]).backward()
        optimizer.step()
    # Behind a zero last layer, the first layer's gradient comes one step later.
    assert all(parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())
    assert prefix()["decoder"][0].square().sum() < keys.square().sum()
    torch.testing.assert_close(prefix.state_dict()["sites.decoder.base_keys"], keys, rtol=0, atol=0)


def test_start_is_copied() -> None:
    prefix, start = started()
    before = prefix()["decoder"][0].clone()
    start[0].zero_()
    torch.testing.assert_close(prefix()["decoder"][0], before, rtol=0, atol=0)


@KINDS
def test_dropout_acts_in_training_alone(projection: bool) -> None:
    prefix = make(projection, num_virtual_tokens=200, prefix_dropout=0.25)
    keys = prefix.eval()()["decoder"][0].detach().clone()
    assert (keys != 0).all()
    dropped = prefix.train()()["decoder"][0]
    kept = dropped != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], keys[kept] / 0.75)
    assert not torch.equal(prefix()["decoder"][0] != 0, kept)


@pytest.mark.parametrize("kind", ["direct", "projection", "started"])
def test_prefix_stays_float32_in_a_half_precision_model(kind: str) -> None:
    prefix = started()[0] if kind == "started" else make(kind == "projection")
    expected = tuple(tensor.detach().clone() for tensor in prefix()["decoder"])
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "prefix": prefix})
    parameters = list(prefix.parameters())
    for change in (model.half, model.bfloat16, model.double, lambda: model.to(torch.bfloat16)):
        change()
    assert model["linear"].weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in prefix.state_dict().values()} == {torch.float32}
    assert all(new is old for new, old in zip(prefix.parameters(), parameters, strict=True))
    torch.testing.assert_close(prefix()["decoder"], expected, rtol=0, atol=0)


def test_device_moves_with_a_dtype_move_the_device_alone() -> None:
    prefix = make(True).to("meta", torch.float16)
    assert {(tensor.device.type, tensor.dtype) for tensor in prefix.parameters()} == {("meta", torch.float32)}


def test_memory_format_leaves_the_last_dim_contiguous() -> None:
    prefix = make(False).to(memory_format=torch.channels_last)
    assert prefix()["decoder"][0].stride(-1) == 1


def test_default_dtype_of_the_process_does_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    for prefix in (make(False), make(True), started()[0]):
        assert {tensor.dtype for tensor in prefix.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@KINDS
def test_copies_are_equal_and_apart(projection: bool, copied: object) -> None:
    prefix = make(projection)
    other = copied(prefix)  # type: ignore[operator]
    torch.testing.assert_close(other()["decoder"], prefix()["decoder"], rtol=0, atol=0)
    assert other.config == prefix.config and other.geometry == prefix.geometry
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in prefix.parameters()}


@KINDS
def test_compiled_prefix_gives_the_same(projection: bool) -> None:
    prefix = make(projection)
    compiled = torch.compile(prefix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled()["decoder"], prefix()["decoder"])
    sum(tensor.square().sum() for tensor in compiled()["decoder"]).backward()
    assert all(parameter.grad is not None for parameter in prefix.parameters())


def test_start_of_another_shape_is_refused() -> None:
    keys, values = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 5, 4)
    with pytest.raises(ValueError, match=r"starting keys \[L, Hkv, P, D\] = \(3, 2, 5, 4\), got \(3, 2, 4, 4\)"):
        Prefix(PrefixConfig(5), GEOMETRY, start={"decoder": (keys, values)})
    with pytest.raises(ValueError, match="a start for the site 'decoder', got \\['encoder'\\]"):
        Prefix(PrefixConfig(5), GEOMETRY, start={"encoder": (values, values)})


def test_name_of_the_base_model_comes_from_its_config() -> None:
    config = tiny_config("gpt2")
    assert Prefix(PrefixConfig(2), config).base_model_name is None
    config._name_or_path = "some/model"
    prefix = Prefix(PrefixConfig(2), config)
    assert prefix.base_model_name == prefix.fold().base_model_name == "some/model"


def test_repr_says_what_it_holds() -> None:
    assert "num_virtual_tokens=5, prefix_projection=True, num_layers=3, num_kv_heads=2, head_dim=4" in repr(make(True))
