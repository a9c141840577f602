"""Frozen linear layers and GPT-2's GELU of a patched model: the same numbers, and back to the class when asked."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models_zoo import assert_close, make_batch, make_model, make_peft, make_prefix
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from prefix_fast import linears, patch, unpatch
from prefix_fast.linears import Product, Times
from prefix_fast.models import linears as hosts_linears
from prefix_fast.models.linears import FrozenLinear
from prefix_fast.models.pointwise import FusedGELU
from prefix_fast.models.stepped import Stepped

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROW_COUNTS = (1, 5, 64)


@pytest.fixture(autouse=True)
def onednn(monkeypatch, tmp_path):
    """Tiny weights step in, a cache of its own, and oneDNN wherever it can be taken."""
    monkeypatch.setattr(hosts_linears, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(linears, "_times", {})
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("PREFIX_FAST_LINEARS", "onednn")


@pytest.fixture
def calls(monkeypatch):
    """The products that oneDNN has computed."""
    made, product = [], linears._onednn

    def counted(x, matrix, bias=None):
        made.append((tuple(x.shape), tuple(matrix.shape)))
        return product(x, matrix, bias)

    monkeypatch.setattr(linears, "_onednn", counted)
    return made


@pytest.fixture
def measured(monkeypatch):
    """The products that were timed; oneDNN is said to be faster by columns alone."""
    monkeypatch.delenv("PREFIX_FAST_LINEARS")
    made = []

    def measure(product):
        made.append(product)
        return Times(1.0, 0.5 if product.layout == "columns" else 0.99)

    monkeypatch.setattr(linears, "measure", measure)
    return made


def stepped(model, kind=(FrozenLinear, FusedGELU)):
    return [module for module in model.modules() if isinstance(module, kind)]


def parameters(dtype, bias, transposed, inputs=24, outputs=40):
    size = (inputs, outputs) if transposed else (outputs, inputs)
    return [
        nn.Parameter(values.to(dtype), requires_grad=False) if values is not None else None
        for values in (torch.randn(size), torch.randn(outputs) if bias else None)
    ]


def views(x):
    """The same numbers lying otherwise, and a gradient that is expanded."""
    wide = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    return {"plain": x, "sliced": wide, "transposed": x.mT.contiguous().mT}


@pytest.mark.parametrize("view", ["plain", "sliced", "transposed"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", RELATIVE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_product_and_gradient_equal_torch(rows, dtype, bias, transposed, view, calls):
    weight, offset = parameters(dtype, bias, transposed)
    x = views(torch.randn(2, rows, 24).to(dtype))[view].detach().requires_grad_()
    y = linears.frozen_linear(x, weight, offset, transposed)
    dy = torch.randn(2, rows, 1).to(dtype).expand(2, rows, 40)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert len(calls) == 2
    matrix = weight.t() if transposed else weight
    theirs = x.detach().float().requires_grad_()
    truth = F.linear(theirs, matrix.float(), None if offset is None else offset.float())
    assert_close(y.float(), truth, RELATIVE[dtype])
    assert_close(dx.float(), torch.autograd.grad(truth, theirs, dy.float())[0], RELATIVE[dtype])
    assert y.dtype == dx.dtype == dtype and y.is_contiguous()


def test_gradient_is_differentiable_again():
    weight, _ = parameters(torch.float64, False, False, 3, 4)
    weight = nn.Parameter(weight.float(), requires_grad=False)
    x = torch.randn(5, 3, requires_grad=True)
    y = linears.frozen_linear(x, weight, None)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((dx**2).sum(), x)
    square = weight.t() @ weight
    assert_close(dx, 2 * x @ square, 1e-5)
    assert_close(second, 8 * x @ square @ square, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_patched_model_keeps_its_numbers_and_unpatch_its_classes(family, calls, monkeypatch):
    model, batch = make_model(family), make_batch("left")
    classes = [type(module) for module in model.modules()]
    patch(model, make_prefix(model)).train()
    assert len(stepped(model, FrozenLinear)) >= 8
    loss = model(**batch.arguments()).loss
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.prefix.parameters()]
    assert calls
    calls.clear()
    monkeypatch.setenv("PREFIX_FAST_LINEARS", "0")
    model.zero_grad()
    expected = model(**batch.arguments()).loss
    expected.backward()
    assert not calls
    assert_close(loss, expected, 1e-5)
    for ours, theirs in zip(found, (parameter.grad for parameter in model.prefix.parameters()), strict=True):
        assert_close(ours, theirs, 1e-5)
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes and not stepped(model)


def test_peft_model_steps_in_and_out(calls):
    model, batch = make_peft("gpt2"), make_batch("left")
    patch(model).train()
    assert stepped(model.base_model, FrozenLinear) and not stepped(model.prompt_encoder)
    model(**batch.arguments()).loss.backward()
    assert calls
    unpatch(model)
    assert not stepped(model)


def test_classes_look_as_before(calls):
    model = patch(make_model("gpt2"), 3)
    for module in stepped(model):
        original = type(module)._prefix_fast_class
        assert isinstance(module, original) and type(module).__name__ == original.__name__
    kinds = {type(module)._prefix_fast_class for module in stepped(model)}
    assert kinds == {nn.Linear, Conv1D, NewGELUActivation}


def test_copies_and_pickles_step_in_too(calls):
    model, batch = make_model("gpt2"), make_batch("left")
    patch(model, make_prefix(model))
    expected = model(batch.input_ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(stepped(copied)) == len(stepped(model))
        calls.clear()
        assert torch.equal(copied(batch.input_ids).logits, expected) and calls
        assert not stepped(unpatch(copied))
    assert stepped(model)


def test_training_takes_the_same_steps(monkeypatch):
    losses = {}
    for chosen in ("onednn", "0"):
        monkeypatch.setenv("PREFIX_FAST_LINEARS", chosen)
        model = patch(make_model("gpt2"), make_prefix(make_model("gpt2"))).train()
        optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=1e-2)
        losses[chosen] = []
        for step in range(8):
            loss = model(**make_batch("left", seed=step % 2).arguments()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[chosen].append(float(loss.detach()))
    assert losses["onednn"][-2] < losses["onednn"][0]
    assert losses["onednn"] == pytest.approx(losses["0"], rel=1e-5)


def test_gradient_checkpointing_and_accumulated_graphs_give_the_same_gradients(calls):
    model, batch = make_model("gpt2"), make_batch("left")
    patch(model, make_prefix(model)).train()
    model(**batch.arguments()).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.prefix.parameters()]
    model.zero_grad()
    name = "activation_checkpointing_enable"  # of newer releases of transformers
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    calls.clear()
    model(**batch.arguments()).loss.backward()
    assert calls
    for ours, theirs in zip((parameter.grad for parameter in model.prefix.parameters()), plain, strict=True):
        assert_close(ours, theirs, 1e-6)


def test_unfrozen_weight_gets_its_gradient(calls):
    model, batch = make_model("llama"), make_batch("left")
    patch(model, make_prefix(model)).train()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.requires_grad_(True)
    model(**batch.arguments()).loss.backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert calls


def test_other_dtype_device_and_autocast_run_the_class(calls):
    layer = nn.Linear(8, 6).requires_grad_(False)
    x = torch.randn(4, 8)
    for dtype in (torch.float64, torch.float16):
        layer.to(dtype)
        assert linears.frozen_linear(x.to(dtype), layer.weight, layer.bias) is None
    layer.to(torch.bfloat16)
    assert linears.frozen_linear(x, layer.weight, layer.bias) is None
    layer.to("meta")
    assert linears.frozen_linear(x.to("meta"), layer.weight, layer.bias) is None
    layer = nn.Linear(8, 6).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linears.frozen_linear(x, layer.weight, layer.bias) is None
    torch._C._set_mkldnn_enabled(False)
    assert linears.frozen_linear(x, layer.weight, layer.bias) is None
    torch._C._set_mkldnn_enabled(True)
    assert linears.frozen_linear(x[0], layer.weight, layer.bias) is None
    assert linears.frozen_linear(torch.randn(4, 7), layer.weight, layer.bias) is None
    assert not calls


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
def test_transforms_and_modes_see_torch_operators(calls):
    from torch.utils.flop_counter import FlopCounterMode

    model = patch(make_model("llama"), 3)
    layer, x = model.lm_head, torch.randn(5, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * layer.weight.numel()
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    assert_close(tangent, F.linear(x, layer.weight), 1e-5)
    batched = torch.func.vmap(layer)(x.unsqueeze(0))
    assert_close(batched[0], F.linear(x, layer.weight), 1e-5)
    assert not calls


def test_weights_of_others_are_left_alone():
    class Quantised(nn.Linear):
        pass

    model = make_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.__class__ = Quantised
    first.gate_proj.register_forward_hook(lambda module, args, out: out)
    first.down_proj.register_full_backward_hook(lambda module, dx, dy: None)
    nn.utils.parametrize.register_parametrization(second.up_proj, "weight", nn.Identity())
    second.gate_proj.forward = second.gate_proj.forward
    second.down_proj.weight = nn.Parameter(second.down_proj.weight.to(torch.int8), requires_grad=False)
    strangers = [first.up_proj, first.gate_proj, first.down_proj, second.up_proj, second.gate_proj, second.down_proj]
    hosts_linears.step_in(model.requires_grad_(False))
    assert stepped(model, FrozenLinear) and not any(isinstance(module, Stepped) for module in strangers)


def test_layers_in_lora_and_trained_ones_are_left_alone():
    peft = pytest.importorskip("peft")
    model = make_model("llama").requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    wrapped.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    hosts_linears.step_in(wrapped)
    names = {name for name, module in wrapped.named_modules() if isinstance(module, Stepped)}
    assert not any("q_proj" in name for name in names) and "model.layers.1.mlp.up_proj" not in names
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"} <= names


def test_model_that_is_trained_keeps_its_gelu():
    model = patch(make_model("gpt2"), 3, freeze=False)
    assert not stepped(model)
    patch(model, 3)
    assert stepped(model, FusedGELU)
    patch(model, 3, freeze=False)
    assert not stepped(model)


@pytest.mark.parametrize("dtype", RELATIVE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("chain", [NewGELUActivation, FastGELUActivation])
def test_fused_gelu_equals_the_chain(chain, dtype):
    holder = nn.ModuleList([chain()])
    hosts_linears.step_in(holder)
    assert isinstance(holder[0], FusedGELU)
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.randn(500)]).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    truth = chain()(exact)
    y = holder[0](x)
    assert_close(y.double(), truth, RELATIVE[dtype])
    assert_close(
        torch.autograd.grad(y.sum(), x)[0].double(), torch.autograd.grad(truth.sum(), exact)[0], RELATIVE[dtype]
    )


def test_decisions_are_measured_once_and_read_by_the_next_process(measured, monkeypatch, tmp_path):
    patch(make_model("llama"), 3)
    assert sorted(measured) == sorted(linears.products_of([torch.float32]))
    patch(make_model("llama"), 3)
    monkeypatch.setattr(linears, "_times", {})  # as in another process
    patch(make_model("gpt2"), 3)
    assert len(measured) == 6
    assert linears.library_of(Product(torch.float32, "columns", "few")) == "onednn"
    assert linears.library_of(Product(torch.float32, "rows", "few")) == "torch"
    linears.decide([Product(torch.float32, "rows", "few")], renew=True)
    assert len(measured) == 7
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(f"{product}.json" for product in linears.products_of([torch.float32]))


def test_calls_follow_the_decision_in_each_direction(measured, calls):
    linears.decide(linears.products_of([torch.float32]))
    for transposed in (False, True):
        weight, bias = parameters(torch.float32, True, transposed)
        x = torch.randn(5, 24, requires_grad=True)
        linears.frozen_linear(x, weight, bias, transposed).sum().backward()
        assert_close(x.grad, weight.sum(1 if transposed else 0).expand(5, 24), 1e-5)
    assert calls == [((5, 40), (24, 40)), ((5, 24), (40, 24))]
    weight, bias = parameters(torch.float32, True, False)
    assert linears.frozen_linear(torch.randn(5, 24), weight, bias) is None


def test_first_of_two_processes_wins(measured, monkeypatch):
    product = Product(torch.float32, "columns", "few")
    linears._keep(product, Times(1.0, 0.25), renew=False)
    assert linears._keep(product, Times(1.0, 2.0), renew=False) == Times(1.0, 0.25)
    assert linears._keep(product, Times(1.0, 2.0), renew=True) == Times(1.0, 2.0) == linears._read(product)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"seconds": {"torch": 1, "onednn": -1}}', b"\xff\0"])
def test_damaged_file_is_measured_again(measured, content):
    product = Product(torch.float32, "columns", "few")
    file = linears._file(product)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert linears.times_of(product) is None and linears.library_of(product) == "torch"
    linears.decide([product])
    assert linears._read(product) == Times(1.0, 0.5) and linears.library_of(product) == "onednn"


def test_times_of_another_machine_do_not_count(measured, monkeypatch):
    product = Product(torch.float32, "columns", "few")
    linears.decide([product])
    file, here = linears._file(product), linears.environment()
    monkeypatch.setattr(linears, "environment", lambda: here._replace(processor="another"))
    assert linears._file(product) != file and linears._read(product) is None
    monkeypatch.setattr(linears, "_file", lambda product: file)
    assert linears._read(product) is None


def test_nothing_is_kept_where_the_cache_cannot_be_written(measured, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(blocked))
    patch(make_model("llama"), 3)
    assert measured and linears.library_of(Product(torch.float32, "columns", "few")) == "torch"


def test_deterministic_algorithms_measure_nothing_and_stay_with_torch(measured, calls):
    torch.use_deterministic_algorithms(True)
    model, batch = make_model("llama"), make_batch("left")
    expected = model(batch.input_ids).logits
    patch(model, 0)
    assert measured == []
    linears._times.update({product: Times(1.0, 0.1) for product in linears.products_of()})
    model(batch.input_ids)
    assert not calls
    torch.use_deterministic_algorithms(False)
    assert_close(model(batch.input_ids).logits, expected, 1e-5)
    assert calls


def test_variable_turns_everything_off(measured, calls, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_LINEARS", "0")
    model = patch(make_model("gpt2"), 3)
    assert not stepped(model) and measured == []
    linears.decide(linears.products_of(), renew=True)
    assert measured == [] and not any(path.name.endswith("json") for path in linears.cache_folder().rglob("*"))


def test_measurement_times_both_and_finds_wrong_numbers(monkeypatch):
    product = Product(torch.float32, "columns", "one")
    times = linears.measure(product)
    assert 0 < times.torch < 1 and 0 < times.onednn < 1
    assert Times(1.0, 0.94).fastest == "onednn" and Times(1.0, 0.96).fastest == "torch"
    assert Times(102e-6, 94e-6).fastest == "torch" and Times(300e-6, 200e-6).fastest == "onednn"  # a call takes 25 µs
    monkeypatch.setattr(linears, "_onednn", lambda x, matrix, bias=None: F.linear(x, matrix, bias) * (1 + 1e-4))
    assert linears.measure(product).onednn == torch.inf and linears.measure(product).fastest == "torch"
