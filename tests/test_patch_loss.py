"""The fused loss: only labelled positions reach the head, logits are computed when first read."""

import pytest
import torch
from models_zoo import FAMILIES, assert_close, make_batch, make_model, make_prefix, twin

from prefix_fast import dispatch
from prefix_fast.models import head
from prefix_fast.patching import patch


@pytest.fixture
def watched():
    """A patched model in training mode, its batch, and the rows that its head has seen."""
    model = patch(make_model("llama"), 5).train()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    return model, make_batch("left"), seen


def labelled(batch):
    return int((batch.labels[:, 1:] != -100).sum())


def test_head_sees_labelled_positions_only(watched):
    model, batch, seen = watched
    model(**batch.arguments()).loss.backward()
    assert seen == [labelled(batch)]
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith("prefix."))


@pytest.mark.parametrize(
    "read",
    [
        lambda out: out.logits,
        lambda out: out["logits"],
        lambda out: out[1],
        lambda out: out[:2][1],
        lambda out: out.get("logits"),
        lambda out: dict(out)["logits"],
        lambda out: out.to_tuple()[1],
        lambda out: torch.add(list(out.values())[1], 0),
        lambda out: dict(out.items())["logits"] * 1,
        lambda out: list(out)[1] == "logits" and out.logits,
    ],
    ids=["attribute", "key", "index", "slice", "get", "dict", "tuple", "values", "items", "iteration"],
)
def test_logits_are_computed_when_read(watched, read):
    model, batch, seen = watched
    plain = twin(model).eval()(**batch.arguments())
    seen.clear()
    out = model(**batch.arguments())
    assert out.loss is out[0] is out["loss"] and len(seen) == 1
    with torch.no_grad():
        logits = read(out)
    assert len(seen) == 2
    assert_close(logits[batch.computed()], plain.logits[batch.computed()], 1e-5)
    assert out.logits is out["logits"] and len(seen) == 2
    assert out.logits.requires_grad
    assert tuple(out.keys()) == tuple(plain.keys())


def test_read_logits_carry_their_graph(watched):
    model, batch, _ = watched
    plain = twin(model)
    plain._prefix_fast.fused_loss = False
    for each in (model, plain):
        out = each(**batch.arguments())
        (out.loss + out.logits[batch.computed()].square().mean()).backward()
    for ours, theirs in zip(model.prefix.parameters(), plain.prefix.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_mixed_precision_through_accelerate_reads_no_logits(watched):
    from accelerate.utils import convert_outputs_to_fp32

    model, batch, seen = watched
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = convert_outputs_to_fp32(model)(**batch.arguments())
    assert seen == [labelled(batch)]
    assert out.logits.dtype == torch.float32
    expected = model.eval()(**batch.arguments()).logits
    assert_close(out.logits[batch.computed()], expected[batch.computed()], 0.03)


def test_casting_outputs_as_fsdp_does_reads_no_logits(watched):
    from torch.distributed.utils import _apply_to_tensors

    model, batch, seen = watched
    out = _apply_to_tensors(lambda tensor: tensor.double(), model(**batch.arguments()))
    assert out.loss.dtype == torch.float64 and seen == [labelled(batch)]
    expected = model.eval()(**batch.arguments()).logits
    assert_close(out.logits[batch.computed()], expected[batch.computed()], 1e-5)


def test_logits_read_outside_autocast():
    model, batch = patch(make_model("llama"), 5).train(), make_batch("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch.arguments())
    assert out.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite", "gpt_oss"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"shift_labels": "rolled"},
    ],
    ids=["items", "items-tensor", "ignore-index", "shift-labels"],
)
def test_loss_arguments_as_in_transformers(family, arguments):
    model, batch = patch(make_model(family), 5).train(), make_batch("left")
    plain = twin(model)
    plain._prefix_fast.fused_loss = False
    given = {**batch.arguments(), **arguments}
    if arguments.get("shift_labels") is not None:
        given["shift_labels"] = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
        given["labels"] = torch.full_like(batch.labels, 9)
    if "ignore_index" in arguments:
        given["labels"] = batch.labels.masked_fill(batch.labels == -100, 5)
    losses = [each(**given).loss for each in (model, plain)]
    assert_close(*losses, 1e-6)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(model.prefix.parameters(), plain.prefix.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_no_labelled_position():
    model, batch = patch(make_model("gpt2"), 5).train(), make_batch("left")
    nothing = torch.full_like(batch.labels, -100)
    assert torch.isnan(model(batch.input_ids, labels=nothing).loss)
    loss = model(batch.input_ids, labels=nothing, num_items_in_batch=3).loss
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in model.prefix.parameters())


@pytest.fixture
def heads(monkeypatch):
    """The options of each call of the function that is head and loss together."""
    calls, function = [], head.linear_cross_entropy
    monkeypatch.setattr(head, "linear_cross_entropy", lambda *args, **kw: (calls.append(kw), function(*args, **kw))[1])
    return calls


@pytest.mark.parametrize(
    ("family", "option"),
    [*((family, None) for family in FAMILIES), ("gemma2", ("softcap", 3.0)), ("granite", ("logit_scale", 0.25))],
)
def test_frozen_head_and_loss_are_one_function(family, option, heads):
    model, batch = patch(make_model(family), 5).train(), make_batch("left")
    plain = twin(model)
    plain._prefix_fast.fused_loss = False
    losses = [each(**batch.arguments()).loss for each in (model, plain)]
    assert len(heads) == 1
    assert option is None or heads[0][option[0]] == option[1]
    assert_close(*losses, 1e-6)
    assert losses[0].dtype == losses[1].dtype
    for loss in losses:
        (0.5 * loss).backward()
    for ours, theirs in zip(model.prefix.parameters(), plain.prefix.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.requires_grad_(),
        lambda model: model.lm_head.register_forward_hook(lambda module, args, out: None),
        lambda model: model.lm_head.register_full_backward_hook(lambda module, grads, outs: None),
        lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
        lambda model: setattr(model.lm_head, "__class__", type("Other", (torch.nn.Linear,), {})),
    ],
    ids=["trained", "hook", "backward-hook", "forward", "subclass"],
)
def test_other_heads_are_called(change, heads):
    model, batch = patch(make_model("llama"), 5).train(), make_batch("left")
    expected = model(**batch.arguments()).loss
    change(model)
    assert_close(model(**batch.arguments()).loss, expected, 1e-6)
    assert len(heads) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_loss_is_float32_as_in_transformers(family, heads):
    model, batch = patch(make_model(family, dtype=torch.bfloat16), 5).train(), make_batch("left")
    plain = twin(model)
    plain._prefix_fast.fused_loss = False
    losses = [each(**batch.arguments()).loss for each in (model, plain)]
    assert len(heads) == 1
    assert losses[0].dtype == losses[1].dtype == torch.float32
    assert_close(*losses, 1e-2)


def test_label_out_of_the_vocabulary_raises():
    model, batch = patch(make_model("gpt2"), 5).train(), make_batch("left")
    batch.labels[0, -1] = 61
    with pytest.raises(ValueError, match="expected labels from 0 to 60, or -100 for none, got 61"):
        model(**batch.arguments())


def test_own_loss_function_is_called(watched):
    model, batch, seen = watched
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 42
    assert model(**batch.arguments()).loss == 42
    assert seen == [batch.input_ids.numel()]


@pytest.mark.parametrize("arguments", [{"logits_to_keep": 4}, {"return_dict": False}], ids=["keep", "tuple"])
def test_other_calls_take_the_models_own_path(watched, arguments):
    model, batch, _ = watched
    given = {**batch.arguments(), **arguments}
    if "logits_to_keep" in arguments:
        given.pop("labels")
    out = model(**given)
    assert isinstance(out, tuple) if "return_dict" in arguments else out.logits.shape[1] == 4


def test_eval_mode_computes_logits_at_once(watched):
    model, batch, seen = watched
    expected = model(**batch.arguments()).loss
    seen.clear()
    found = model.eval()(**batch.arguments())
    assert seen == [batch.input_ids.numel()]
    assert_close(found.loss, expected, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backend_reaches_the_operator(backend, monkeypatch):
    model, batch = make_model("llama"), make_batch("left")
    patch(model, make_prefix(model), backend=backend)
    module = dispatch.ops.load_backend(backend)
    calls, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args: (calls.append(backend), forward(*args)))
    model(batch.input_ids)
    assert len(calls) == model.config.num_hidden_layers
