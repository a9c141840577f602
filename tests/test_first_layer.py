"""Nothing is differentiated below what needs a gradient: of the first layer the prefix alone, checkpointed or not."""

from typing import Any, NamedTuple

import pytest
import torch
from models_zoo import assert_close, make_batch, make_model, make_peft, make_prefix, twin
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix

from prefix_fast import ops, patch, unpatch
from prefix_fast.models import hub, packed, packed_seq2seq, sites

# What stands below the first attention to a prefix.
BELOW = {
    "gpt2": ("wte", "wpe", "h.0.ln_1", "h.0.attn.c_attn"),
    "llama": ("embed_tokens", "layers.0.input_layernorm", *(f"layers.0.self_attn.{x}_proj" for x in "qkv")),
    "bart": tuple(
        f"{part}.{name}"
        for part in ("encoder", "decoder")
        for name in ("embed_tokens", "embed_positions", *(f"layers.0.self_attn.{x}_proj" for x in "qkv"))
    ),
}


class Wanted(NamedTuple):
    """Which gradients one call of the operator was asked for."""

    query: bool
    own: bool
    prefix: bool


@pytest.fixture
def wanted(monkeypatch) -> dict[tuple[str, int], Wanted]:
    """Site and layer → the gradients that the backend computed for it."""
    found: dict[tuple[str, int], Wanted] = {}
    seen: list[tuple[tuple[str, int], Any]] = []  # the queries are kept, so that no two have the same address
    backward = ops.load_backend("cpu").backward

    def noting(attend):
        def noted(self, module, query, *args, **kwargs):
            seen.append((sites.site_of(module)[:2], query))
            return attend(self, module, query, *args, **kwargs)

        return noted

    def counted(problem, out, lse, grad_out, grad_lse, grads):
        (site,) = (site for site, query in seen if query.data_ptr() == problem.query.data_ptr())
        own = {grad is not None for grad in (grads.key, grads.value)}
        prefix = {grad is not None for pair in grads.sets for grad in pair}
        assert len(own) == len(prefix) == 1 and site not in found
        found[site] = Wanted(grads.query is not None, *own, *prefix)
        backward(problem, out, lse, grad_out, grad_lse, grads)

    for context in (hub.PrefixContext, packed.PackedContext, packed_seq2seq.PairsContext):
        monkeypatch.setattr(context, "attend", noting(context.attend))
    monkeypatch.setattr(ops.load_backend("cpu"), "backward", counted)
    return found


def make(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model to patch, its prefix, and a batch."""
    if kind == "peft":
        return make_peft("gpt2"), None, make_batch("left").arguments()
    if kind == "bart":
        model, batch = make_seq2seq("bart"), make_seq2seq_batch()
        return model, make_site_prefix(model), {**batch._asdict()}
    model = make_model(kind)
    return model, make_prefix(model), make_batch("left").arguments()


def poison(model: Any, family: str) -> list[str]:
    """Let any gradient of the outputs below the first prefix raise; returns their modules, when they run."""
    named, ran = dict(model.named_modules()), []

    def forbidden(gradient):
        raise AssertionError("a gradient that nothing needs was computed")

    for name in BELOW[family]:
        (module,) = {module for full, module in named.items() if full.endswith(f".{name}")}

        def watch(module, args, out, name=name):
            ran.append(name)
            if out.requires_grad:
                out.register_hook(forbidden)

        module.register_forward_hook(watch)
    return ran


def train(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of one step."""
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def checkpoint(model: Any) -> None:
    """As Trainer does it."""
    name = "activation_checkpointing_enable"  # of newer releases of transformers
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


@pytest.mark.parametrize("checkpointing", ["none", "before", "after"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "peft"])
def test_first_layer_differentiates_the_prefix_alone(kind, checkpointing, wanted):
    model, prefix, batch = make(kind)
    expected = train(patch(twin(model), prefix, backend="cpu"), batch)
    wanted.clear()
    if checkpointing == "before":
        checkpoint(model.base_model if kind == "peft" else model)
    patch(model, prefix, backend="cpu")
    if checkpointing == "after":
        checkpoint(model)
    family = "gpt2" if kind == "peft" else kind
    ran = poison(model, family)
    found = train(model, batch)
    assert set(ran) == set(BELOW[family])
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-5)
    # The cross-attention's keys come from the encoder, where a prefix stands before them.
    below = {("decoder", 0), ("encoder", 0)} & wanted.keys()
    assert len(below) == (2 if kind == "bart" else 1) < len(wanted)
    for site, asked in wanted.items():
        assert asked == (Wanted(False, False, True) if site in below else Wanted(True, True, True)), site


@pytest.mark.parametrize("when", ["before", "after"])
def test_unpatched_model_has_the_input_gradients_that_were_asked_for(when):
    model, batch = make_model("llama"), make_batch("none")
    if when == "before":
        model.enable_input_require_grads()
    patch(model, make_prefix(model))
    if when == "after":
        model.enable_input_require_grads()
    assert not model.get_input_embeddings()(batch.input_ids).requires_grad
    patch(model, 3)  # another prefix
    assert not model.get_input_embeddings()(batch.input_ids).requires_grad
    unpatch(model).requires_grad_(False)
    assert model.get_input_embeddings()(batch.input_ids).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(batch.input_ids).requires_grad


def test_disabled_input_gradients_stay_so():
    model = patch(make_model("llama"), 3)
    model.enable_input_require_grads()
    model.disable_input_require_grads()
    unpatch(model).requires_grad_(False)
    assert not model.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long)).requires_grad


class UnmarkedCheckpoint:
    """Checkpointing that does not say how it works."""

    def __call__(self, function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


def test_input_gradients_come_where_checkpointing_may_need_them():
    """A trainable model without a prefix, whose layers somebody checkpoints in a way of his own."""
    model, batch = patch(make_model("llama"), 0), make_batch("none")
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = UnmarkedCheckpoint()
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(batch.input_ids).requires_grad
    assert unpatch(model).get_input_embeddings()(batch.input_ids).requires_grad
