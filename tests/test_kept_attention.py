"""Checkpointing that keeps attention: the same gradients bit for bit, and no attention is computed twice."""

import copy
import gc
import weakref

import pytest
import torch
from models_zoo import make_batch, make_model, make_peft, make_prefix
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix
from torch.utils.checkpoint import checkpoint

import prefix_fast
from prefix_fast import keep_attention, linears, ops, patch

KEEP = {"keep_attention": True}


@pytest.fixture
def forwards(monkeypatch):
    """One entry for each forward that the C++ kernels ran."""
    made, forward = [], ops.load_backend("cpu").forward

    def counted(problem, out, lse):
        made.append(tuple(problem.query.shape))
        forward(problem, out, lse)

    monkeypatch.setattr(ops.load_backend("cpu"), "forward", counted)
    return made


def leaves(requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 5, 16), (2, 2, 5, 16), (2, 2, 5, 16), (1, 2, 7, 16), (1, 2, 7, 16)]
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def attend(query, *others, **options):
    return prefix_fast.prefix_attention(query, *others, backend="cpu", **options)


def twice(query, *others):
    """Attention to what attention gave, with lse in the result."""
    out, lse = attend(query, *others, dropout_p=0.3, return_lse=True)
    return attend(out.sin(), *others, dropout_p=0.3).cos() * lse.sin().unsqueeze(-1)


def region(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=keep_attention)


@pytest.mark.parametrize(("function", "calls"), [(attend, 1), (twice, 2)], ids=["one", "two"])
def test_gradients_are_the_same_bit_for_bit_and_nothing_runs_twice(forwards, function, calls):
    inputs = leaves()
    torch.manual_seed(3)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    forwards.clear()
    torch.manual_seed(3)
    found = torch.autograd.grad(region(function, *inputs).square().sum(), inputs)
    assert len(forwards) == calls
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_regions_nest(forwards):
    """The second run of the outer region is the first of the inner one."""

    def both(*given):
        return region(twice, *given).sin() * attend(*given).tanh()

    inputs = leaves()
    torch.manual_seed(3)
    expected = torch.autograd.grad((twice(*inputs).sin() * attend(*inputs).tanh()).sum(), inputs)
    forwards.clear()
    torch.manual_seed(3)
    found = torch.autograd.grad(region(both, *inputs).sum(), inputs)
    assert len(forwards) == 2 + 1 + 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # summed in another order


def test_retained_graph_is_differentiated_again(forwards):
    inputs = leaves()
    loss = region(twice, *inputs).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert len(forwards) == 2
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), first, strict=True):
        assert torch.equal(ours, theirs)
    assert len(forwards) == 4  # what was kept is gone


def test_nothing_is_kept_outside_of_a_region_or_without_gradients(forwards):
    inputs = leaves()
    region(attend, *leaves(requires_grad=False))
    with torch.no_grad():
        region(attend, *inputs)
    attend(*inputs).sum().backward()
    assert len(forwards) == 3 and prefix_fast.kept.current() is None
    with pytest.raises(ZeroDivisionError):
        region(lambda *given: attend(*given) / (1 // 0), *inputs)
    assert prefix_fast.kept.current() is None


def test_memory_is_given_back():
    inputs = leaves()
    seen = []
    out = region(lambda *given: seen.append(weakref.ref(given[0])) or twice(*given), *[t.sin() for t in inputs])
    assert seen[0]() is not None
    del out
    gc.collect()
    assert seen[0]() is None


def steps_of(model, batch, keywords):
    """The gradients of one step, after checkpointing has been switched on."""
    model = copy.deepcopy(model)
    if keywords is not None:
        name = "activation_checkpointing_enable"  # of newer releases of transformers
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(keywords)
    model.train()
    model(**batch._asdict()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "peft"])
def test_patched_models_attend_once(forwards, kind):
    batch = make_seq2seq_batch() if kind == "bart" else make_batch("left")
    if kind == "peft":
        model = patch(make_peft("gpt2"), backend="cpu")
    else:
        model = make_seq2seq("bart") if kind == "bart" else make_model(kind)
        patch(model, (make_site_prefix if kind == "bart" else make_prefix)(model), backend="cpu")
    forwards.clear()
    expected = steps_of(model, batch, None)
    once = len(forwards)
    for keywords, calls in (({}, 2 * once), (KEEP, once), ({"keep_attention": False}, 2 * once)):
        forwards.clear()
        found = steps_of(model, batch, keywords)
        assert len(forwards) == calls, keywords
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name


def test_trainer_takes_the_keyword(tmp_path, forwards):
    import dataclasses

    from transformers import Trainer, TrainingArguments

    model = patch(make_model("llama"), 3, backend="cpu")
    rows = [dict(zip(("input_ids", "labels"), [row, row], strict=True)) for row in make_batch("none").input_ids]
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    options = {name: True, f"{name}_kwargs": KEEP}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, report_to=[], use_cpu=True, **options
    )
    assert '"keep_attention": true' in arguments.to_json_string()
    forwards.clear()
    Trainer(model, arguments, train_dataset=rows).train()
    assert len(forwards) == model.config.num_hidden_layers


def test_compiled_step_keeps_attention(forwards):
    model, batch = patch(make_model("llama"), 3, backend="cpu").train(), make_batch("left")
    model.activation_checkpointing_enable(KEEP)
    expected = steps_of(model, batch, None)
    forwards.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch.arguments(), use_cache=False).loss.backward()
    assert len(forwards) == model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_policy_of_ones_own():
    model = patch(make_model("llama"), 3)
    with pytest.raises(ValueError, match="expected gradient checkpointing with keep_attention or a context_fn"):
        model.activation_checkpointing_enable({**KEEP, "context_fn": keep_attention})
    model.activation_checkpointing_enable({"context_fn": keep_attention})
    assert steps_of(model, make_batch("none"), None)


@pytest.fixture
def products(monkeypatch):
    """One entry for each product with a frozen weight that ran through oneDNN, where all go."""
    monkeypatch.setenv("PREFIX_FAST_LINEARS", "onednn")
    made, product = [], linears._onednn

    def counted(x, matrix, bias=None):
        made.append(tuple(x.shape))
        return product(x, matrix, bias)

    monkeypatch.setattr(linears, "_onednn", counted)
    return made


def test_last_product_of_a_checkpointed_layer_is_not_repeated(products):
    first, last = (torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(2))

    def layer(x):
        hidden = linears.frozen_linear(x, first.weight, first.bias)
        return linears.frozen_linear(hidden.sin(), last.weight, last.bias)

    x = torch.randn(5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    products.clear()
    (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(found, expected)
    assert len(products) == 2 + 1 + 2


def test_frozen_weight_that_changes_before_the_backward_raises(products):
    layer = torch.nn.Linear(8, 6).requires_grad_(False)
    out = linears.frozen_linear(torch.randn(5, 8, requires_grad=True), layer.weight, layer.bias)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()
