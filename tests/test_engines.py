"""Patched models under DDP, FSDP2, ZeRO-3, torch.compile: only the prefix travels, the numbers are one process's."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from models_zoo import assert_close, make_batch, make_model, make_prefix

from prefix_fast import PrefixConfig, patch
from prefix_fast.models import linears

FAMILIES = ("gpt2", "llama")


def run_processes(root, *engines):
    """What two gloo processes print about every family under these engines."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFIX_FAST_LINEARS": "onednn",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    # With -m and without -P the working directory would be on sys.path: there `kernels` is another package.
    command = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(root / "tests" / "engine_processes.py"), *engines],
        env=environment, cwd=root, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def printed(root):
    return run_processes(root, "ddp", "fsdp2")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_equal_one_on_the_joined_batch(family, engine, printed):
    assert f"{family} {engine}: losses and gradients of one process" in printed


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_gradients_of_the_prefix_travel(family, engine, printed):
    assert f"{family} {engine}: only the prefix travelled" in printed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed, which is compiled against torch")
def test_zero3_equals_one_process_and_only_the_prefix_travels(root):
    printed = run_processes(root, "zero3")
    for family in FAMILIES:
        assert f"{family} zero3: losses and gradients of one process" in printed
        assert f"{family} zero3: only the prefix travelled" in printed


@pytest.fixture
def graphs(monkeypatch):
    """A backend that keeps the graphs that it is given; eager calls run their linear layers through oneDNN."""
    from torch._dynamo.backends.debugging import aot_eager

    kept = []

    def backend(graph, inputs):
        kept.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(linears, "LEAST_WEIGHT", 0)
    monkeypatch.setenv("PREFIX_FAST_LINEARS", "onednn")
    torch._dynamo.reset()
    yield kept, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "reparametrised"])
def test_compiled_training_step_is_one_graph(projection, graphs):
    kept, backend = graphs
    torch.manual_seed(3)
    config = PrefixConfig(5, prefix_projection=projection, **({"encoder_hidden_size": 8} if projection else {}))
    model = patch(make_model("llama"), config).train()
    batch = make_batch("left").arguments()
    expected = model(**batch).loss
    wanted = torch.autograd.grad(expected, list(model.prefix.parameters()))
    loss = torch.compile(model, backend=backend, fullgraph=True)(**batch).loss
    assert len(kept) == 1
    assert_close(loss, expected, 1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.prefix.parameters())), wanted, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_compiled_evaluation_is_one_graph(graphs):
    kept, backend = graphs
    model = make_model("llama")
    patch(model, make_prefix(model))
    batch = make_batch("left")
    with torch.no_grad():
        expected = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        found = compiled(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert len(kept) == 1
    assert_close(found, expected, 1e-5)


def test_compiled_model_trains_in_later_steps_without_new_graphs(graphs):
    kept, backend = graphs
    model = make_model("llama")
    patch(model, make_prefix(model)).train()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.prefix.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = compiled(**make_batch("left").arguments()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0] and len(kept) == 1
