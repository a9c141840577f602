"""Half-precision compute of a float32 model: as close as autocast; weights are copied once and never changed."""

import copy
import pickle

import pytest
import torch
from models_zoo import make_batch, make_model, make_peft, make_prefix
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix

from prefix_fast import half, patch, unpatch
from prefix_fast.models import linears as model_linears

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _tiny_weights(any_half, monkeypatch):
    """Also tiny weights are copied, and on any CPU."""
    monkeypatch.setattr(model_linears, "LEAST_WEIGHT", 0)


@pytest.fixture
def casts(monkeypatch):
    """The weights that were asked for as copies; and the number of copies made."""
    made, original = [], half.copy_of

    def counted(weight, dtype):
        before = half._copies.get(weight)
        found = original(weight, dtype)
        made.append((weight, half._copies.get(weight) is not before))
        return found

    monkeypatch.setattr(half, "copy_of", counted)
    return made


def make(kind):
    if kind == "peft":
        return make_peft("gpt2"), None, make_batch("left").arguments()
    if kind == "bart":
        model = make_seq2seq("bart")
        return model, make_site_prefix(model), make_seq2seq_batch()._asdict()
    model = make_model(kind)
    return model, make_prefix(model), make_batch("left").arguments()


def run(model, batch, autocast=None):
    """Loss and gradients of a step."""
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_as_close(found, rival, exact):
    for ours, theirs, truth in zip(found, rival, exact, strict=True):
        assert ours.dtype == truth.dtype
        error, allowed = ((tensor.float() - truth).abs().max() for tensor in (ours, theirs))
        assert error <= 2 * allowed + 0.01 * truth.abs().max()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "peft"])
def test_step_is_as_close_as_under_autocast(kind, casts):
    model, prefix, batch = make(kind)
    exact = run(patch(copy.deepcopy(model), prefix), batch)
    rival = run(patch(copy.deepcopy(model), prefix), batch, autocast=HALF)
    assert not casts
    patch(model, prefix, compute_dtype=HALF)
    found = run(model, batch)
    assert_as_close(found, rival, exact)
    made = sum(new for _, new in casts)
    assert made > 4 and {weight.dtype for weight, _ in casts} == {torch.float32}
    casts.clear()
    for again in (run(model, batch), run(model, batch, autocast=HALF)):  # also within the user's own autocast
        assert all(torch.equal(ours, first) for ours, first in zip(again, found, strict=True))
    assert casts and not any(new for _, new in casts)
    casts.clear()
    exact, rival = (run(other, batch) for other in (patch_without(model), model))
    assert_as_close(rival, found, exact)


def patch_without(model):
    """The same model, patched for its own dtype."""
    other = unpatch(copy.deepcopy(model))
    prefix = getattr(model, "prefix", None)
    return patch(other, None if prefix is None else copy.deepcopy(prefix))


def test_head_and_loss_read_the_copy(casts):
    model = patch(make_model("llama"), 3, compute_dtype=HALF)
    run(model, make_batch("left").arguments())
    assert any(weight is model.lm_head.weight for weight, _ in casts)
    out = model.train()(**make_batch("left").arguments())
    casts.clear()
    assert out.logits.dtype == HALF
    assert any(weight is model.lm_head.weight for weight, _ in casts) and not any(new for _, new in casts)


def test_weights_files_and_unpatch_are_as_without(tmp_path):
    model = make_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = list(model.parameters())
    patch(model, 3, compute_dtype=HALF)
    run(model, make_batch("left").arguments())
    assert any(weight in half._copies for weight in weights)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors"}
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("prefix.")}
    assert state.keys() == before.keys()
    unpatch(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert not any(weight in half._copies for weight in weights)
    assert not any(half.MARK in module.__dict__ for module in model.modules())
    patch(patch(model, 3, compute_dtype=HALF), 3)  # patched again, without
    assert not any(half.MARK in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_compute_alike(through):
    model, batch = patch(make_model("gpt2"), 3, compute_dtype=HALF), make_batch("left").arguments()
    expected = run(model, batch)
    for ours, theirs in zip(run(through(model), batch), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_copy_follows_its_weight(casts):
    model, batch = patch(make_model("llama"), 3, compute_dtype=HALF), make_batch("left").arguments()
    run(model, batch)
    other = make_model("llama", seed=5)
    model.load_state_dict(other.state_dict(), strict=False)
    expected = run(patch(other, copy.deepcopy(model.prefix), compute_dtype=HALF), batch)
    for ours, theirs in zip(run(model, batch), expected, strict=True):
        assert torch.equal(ours, theirs)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone() + 1
    assert torch.equal(half.copy_of(weight, HALF), weight.to(HALF))


def test_copy_made_without_gradients_serves_training():
    model, batch = patch(make_model("llama"), 3, compute_dtype=HALF), make_batch("none")
    with torch.inference_mode():
        model.eval().generate(batch.input_ids, max_new_tokens=2, do_sample=False)
    assert all(torch.isfinite(tensor).all() for tensor in run(model, batch.arguments()))


def test_weight_that_is_trained_again_and_other_dtypes_run_under_autocast(casts):
    model, batch = patch(make_model("llama"), 3, compute_dtype=HALF), make_batch("left").arguments()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.requires_grad_(True)
    run(model, batch)
    assert layer.weight.grad is not None and not any(weight is layer.weight for weight, _ in casts)
    casts.clear()
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(torch.randn(2, 32)).dtype == torch.float16
    assert layer(torch.randn(2, 32)).dtype == torch.float32 and not casts


def test_checkpointed_step_is_the_same():
    model, batch = patch(make_model("gpt2"), 3, compute_dtype=HALF), make_batch("left").arguments()
    expected = run(model, batch)
    model.activation_checkpointing_enable({"keep_attention": True})
    for ours, theirs in zip(run(model, batch), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_dtype_without_instructions_is_refused(monkeypatch):
    monkeypatch.undo()  # what the machine has is asked again
    half._lacking_cpu.cache_clear()
    monkeypatch.setattr(half, "instructions", lambda: frozenset({"avx2", "fma"}))
    model, plain = make_model("gpt2"), make_peft("gpt2")
    for given in ((model, 3), (plain,)):
        message = r"patch: expected a compute_dtype .* got bfloat16: this CPU has no instructions .*avx512_bf16"
        with pytest.raises(NotImplementedError, match=message):
            patch(*given, compute_dtype=HALF)
    assert not hasattr(model, "prefix")
    model = patch(model, 3)
    model._prefix_fast.compute_dtype = HALF
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel: expected a compute_dtype"):
        model(**make_batch().arguments())
    half._lacking_cpu.cache_clear()
    monkeypatch.setattr(half, "instructions", lambda: frozenset({"amx_bf16"}))
    assert half.lacking(torch.device("cpu"), HALF) is None
    assert "avx512_fp16" in half.lacking(torch.device("cpu"), torch.float16)
    half._lacking_cpu.cache_clear()


def test_instructions_are_read(monkeypatch):
    assert isinstance(half.instructions(), frozenset)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "avx512f" in half.instructions() or "avx512_f" in half.instructions()


def test_old_cards_are_refused(monkeypatch):
    half._lacking_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    assert "Card has no instructions" in half._lacking_gpu(0, HALF)
    assert half._lacking_gpu(0, torch.float16) is None
    half._lacking_gpu.cache_clear()
