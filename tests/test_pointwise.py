"""Gated units and RMS norms in one pass: the numbers of PyTorch's chains, and which modules compute so."""

import pytest
import torch
import torch.nn.functional as F
from models_zoo import assert_close, make_batch, make_model, twin

from prefix_fast import patch, unpatch
from prefix_fast.backends import native
from prefix_fast.models import pointwise as modules
from prefix_fast.pointwise import gated_unit, rms_norm

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1,), (3, 17), (2, 5, 64), (41, 1000)]


@pytest.fixture(params=native.LEVELS)
def level(request, monkeypatch):
    """Each instruction set that this machine has."""
    if request.param not in native.extension().supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", request.param)


def units(activation, gate, up):
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return active if up is None else active * up


def norm(x, weight, eps, offset):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight)


def assert_as_exact(function, reference, inputs, dtype):
    """Results and gradients are within twice PyTorch's own error of the same dtype, of the float64 truth."""
    runs = []
    for run, wide in ((function, dtype), (reference, dtype), (reference, torch.float64)):
        leaves = [tensor.to(dtype).to(wide).requires_grad_() for tensor in inputs]
        held = [leaf + 0 for leaf in leaves]  # as a model's, no leaves
        out = run(*held)
        grad = torch.linspace(-1, 2, out.numel()).view(out.shape).to(dtype).to(wide)
        runs.append([out, *torch.autograd.grad(out, leaves, grad)])
    slack = 4 * torch.finfo(dtype).eps
    for ours, theirs, truth in zip(*runs, strict=True):
        error, allowed = ((found.double() - truth).abs().max() for found in (ours, theirs))
        assert ours.dtype == dtype
        assert error <= 2 * allowed + slack * truth.abs().max()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_gated_unit_is_as_exact_as_torch(level, activation, gated, size, dtype):
    gate, up = 4 * torch.randn(size), torch.randn(size)
    inputs = [gate, up] if gated else [gate]
    assert_as_exact(
        lambda gate, up=None: gated_unit(gate, up, activation),
        lambda gate, up=None: units(activation, gate, up),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_rms_norm_is_as_exact_as_torch(level, offset, size, dtype):
    x, weight = 3 * torch.randn(size), torch.randn(size[-1]).to(dtype)
    assert_as_exact(
        lambda x: rms_norm(x, weight, 1e-5, offset),
        lambda x: norm(x.float() if x.dtype == torch.bfloat16 else x, weight.to(x.dtype), 1e-5, offset).to(x.dtype),
        [x],
        dtype,
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_values_saturate(level, activation):
    gate = torch.tensor([-1e20, -200.0, -90.0, 0.0, 90.0, 200.0, 1e20], requires_grad=True)
    out = gated_unit(gate + 0, None, activation)
    out.sum().backward()
    assert torch.equal(out[3:], torch.tensor([0.0, 90.0, 200.0, 1e20]))
    assert out[:3].abs().max() < 1e-6
    assert_close(gate.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), 1e-6)


def test_nan_stays_where_it_is():
    x = torch.zeros(2, 40)
    x[1, 3] = float("nan")
    assert gated_unit(x, None, "silu").isnan().sum() == 1
    assert rms_norm(x, torch.ones(40), 1e-6).isnan().sum() == 40


def test_rows_of_zeros_have_finite_gradients():
    x = torch.zeros(2, 16, requires_grad=True)
    rms_norm(x + 0, torch.ones(16), 1e-6).sum().backward()
    assert_close(x.grad, torch.full((2, 16), 1000.0), 1e-6)


def test_bits_are_those_of_one_thread():
    gate, up, weight = torch.randn(301, 777), torch.randn(301, 777), torch.randn(777)
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found[threads] = gated_unit(gate, up, "silu"), rms_norm(gate, weight, 1e-6)
    for threads in (2, 3):
        assert all(torch.equal(one, many) for one, many in zip(found[1], found[threads], strict=True))


def test_strides_and_second_derivatives():
    gate, up = (torch.randn(5, 7, dtype=torch.float32).t().requires_grad_() for _ in range(2))
    weight = torch.randn(5)
    for ours, theirs in (
        (lambda: gated_unit(gate * 1, up * 1, "silu"), lambda: units("silu", gate * 1, up * 1)),
        (lambda: rms_norm(gate * 1, weight, 1e-6), lambda: norm(gate * 1, weight, 1e-6, 0.0)),
    ):
        for function, results in ((ours, found := []), (theirs, expected := [])):
            (first,) = torch.autograd.grad(function().square().sum(), gate, create_graph=True)
            results += [first, *torch.autograd.grad(first.square().sum(), gate)]
        for mine, other in zip(found, expected, strict=True):
            assert_close(mine, other, 1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(3, dtype=torch.float64), None),
        (torch.randn(3), torch.randn(4)),
        (torch.randn(3), torch.randn(3).bfloat16()),
        (torch.empty(0), None),
        (torch.nn.Parameter(torch.randn(3)), None),
    ],
    ids=["float64", "shapes", "dtypes", "empty", "parameter"],
)
def test_other_tensors_are_the_callers(arguments):
    assert gated_unit(*arguments, "silu") is None


def test_trained_weight_is_the_callers():
    assert rms_norm(torch.randn(3, 4), torch.nn.Parameter(torch.randn(4)), 1e-6) is None


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("gpt2", {"FusedGELU": 2}),
        ("llama", {"GatedMLP": 2, "FrozenRMSNorm": 5}),
        ("qwen3", {"GatedMLP": 2, "FrozenRMSNorm": 9}),
        ("gemma2", {"GatedMLP": 2, "FrozenOffsetRMSNorm": 9}),
    ],
)
def test_modules_of_a_patched_model_compute_so(family, wanted, monkeypatch):
    calls = []
    for name in ("gated_unit", "rms_norm"):
        function = getattr(modules.pointwise, name)
        monkeypatch.setattr(
            modules.pointwise, name, lambda *args, f=function, n=name: calls.append((n, f(*args))) or calls[-1][1]
        )
    model, batch = make_model(family), make_batch("none")
    expected = twin(model)(batch.input_ids).logits
    found = {}
    for module in patch(model, 0).modules():
        for mixin in type(module).__mro__:
            if mixin.__module__ == "prefix_fast.models.pointwise":
                found[mixin.__name__] = found.get(mixin.__name__, 0) + 1
    assert found == wanted
    assert_close(model(batch.input_ids).logits, expected, 1e-5)
    assert len(calls) == sum(wanted.values()) and all(result is not None for _, result in calls)
    assert not any(hasattr(type(module), "_prefix_fast_class") for module in unpatch(model).modules())


def test_hooked_activation_is_called():
    model, batch = patch(make_model("llama"), 3), make_batch("none")
    seen = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(batch.input_ids)
    assert len(seen) == 1


def test_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_LINEARS", "0")
    model = patch(make_model("llama"), 3)
    assert not any(type(module).__mro__[1].__module__ == "prefix_fast.models.pointwise" for module in model.modules())


def test_another_forward_is_not_recognised():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    assert modules.mixin_of(Scaled(4)) is None and modules.mixin_of(LlamaRMSNorm(4)) is modules.FrozenRMSNorm
