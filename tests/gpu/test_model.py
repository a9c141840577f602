"""A patched GPT-2 on this device against transformers itself, which begins with the prefix in its cache."""

from typing import Any

import pytest
import torch
from models_zoo import Batch, cache_with, make_batch, make_model, make_prefix, random_states, twin, with_prefix_mask
from shared_batches import make_features, ordinary, shared

from prefix_fast.patching import patch

P, NEW = 5, 5
SHAPES = {"D8": {}, "D64": {"n_embd": 128, "n_head": 2}}


def models(device: str, shape: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, list[torch.Tensor]]:
    """The patched model, the plain one, and the prefix's keys and values for it."""
    plain = make_model("gpt2", dtype=dtype, **SHAPES[shape]).to(device)
    patched = twin(plain)
    prefix = make_prefix(patched, P)
    return patch(patched, prefix, backend="triton"), plain, [s.to(device) for s in random_states(plain, P)]


def batch_on(device: str, padding: str = "left") -> Batch:
    return Batch(*(tensor.to(device) for tensor in make_batch(padding)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_prefix_gradient_equal_those_of_a_cached_prefix(device: str, shape: str, dtype: torch.dtype) -> None:
    patched, plain, states = models(device, shape, dtype)
    batch = batch_on(device, "none")
    patched.train()
    loss = patched(**batch.arguments()).loss
    loss.backward()
    found = [parameter.grad for parameter in patched.parameters() if parameter.grad is not None]
    for state in states:
        state.requires_grad_()
    expected = plain(
        batch.input_ids,
        attention_mask=with_prefix_mask(batch.attention_mask, P),
        labels=batch.labels,
        past_key_values=cache_with(*states, len(batch.input_ids), dtype),
    ).loss
    expected.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(loss.float(), expected.float(), rtol=tolerance, atol=tolerance)
    assert sum(grad.numel() for grad in found) == sum(state.numel() for state in states)
    largest = max(float(state.grad.abs().max()) for state in states)
    ours = torch.cat([grad.float().flatten() for grad in found])
    theirs = torch.cat([state.grad.float().flatten() for state in states])
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


def test_shared_sources_equal_an_ordinary_batch(device: str) -> None:
    patched, _, _ = models(device, "D64")
    features, steps = make_features((2, 1)), []
    for model, batch in ((patched.train(), shared(features)), (twin(patched), ordinary(features))):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        steps.append((loss.detach(), torch.cat(gradients)))
    (loss, ours), (expected, theirs) = steps
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_generated_tokens_equal_those_of_a_cached_prefix(device: str, shape: str, options: dict[str, Any]) -> None:
    patched, plain, states = models(device, shape)
    batch = batch_on(device)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, "do_sample": False, **options}
    with torch.no_grad():
        found = patched.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **settings)
        settings.pop("cache_implementation", None)
        rows, width = batch.input_ids.shape
        ids = torch.cat([batch.input_ids.new_full((rows, P), 3), batch.input_ids], dim=1)
        mask = with_prefix_mask(batch.attention_mask, P)
        cache = cache_with(*states, rows * settings.get("num_beams", 1))
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, P)
        expected = plain.generate(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **settings
        )
    assert torch.equal(found[:, width:], expected[:, P + width :])
