"""What a patched PeftModel does beside the same unpatched: training steps, saved files."""

import torch
from models_zoo import assert_close


def step(model, batch, optimizer=None, **arguments):
    """Loss and gradients by name; with an optimizer, one step of it."""
    model.train()
    model.zero_grad()
    loss = model(**{**batch.arguments(), **arguments}).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if optimizer is not None:
        optimizer.step()
    return loss.detach(), gradients


def assert_same_step(ours, theirs):
    assert_close(ours[0], theirs[0], 1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert_close(ours[1][name], gradient)


def assert_same_training(ours, theirs, batches):
    """Losses, gradients and, after an optimizer's step for every batch, parameters are equal."""
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3, momentum=0.9) for m in (ours, theirs)
    ]
    for batch in batches:
        assert_same_step(*(step(m, batch, o) for m, o in zip((ours, theirs), optimizers, strict=True)))
    for (name, ours_now), (same, theirs_now) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == same
        assert_close(ours_now, theirs_now)


def assert_same_files(folder, ours, theirs):
    """Both save the same files, byte for byte; ours are left in `folder / "ours"`."""
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(folder / name)
    files = sorted(path.name for path in (folder / "theirs").iterdir())
    assert files == sorted(path.name for path in (folder / "ours").iterdir())
    for name in files:
        assert (folder / "ours" / name).read_bytes() == (folder / "theirs" / name).read_bytes()
