"""What a device adds to the mathematics: streams, graphs, compilation, waiting, sizes, and every run the same bits."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import prefix_fast
from prefix_fast.testing import Case, evaluate, make_problem, output_grads

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
card = pytest.mark.card


class Step:
    """Forward and backward of a bank's rows on tensors that stay where they are, as a captured graph needs them."""

    def __init__(self, device: str, B: int = 6, T: int = 100, P: int = 150, N: int = 3, D: int = 64) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float16)

        self.leaves = [normal(B, 4, T, D), *(normal(B, 2, T, D) for _ in range(2)), *(normal(N, 2, P, D) for _ in "kv")]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.grad_out = normal(B, 4, T, D)
        self.ids = torch.randint(-1, N, (B,), device=device)
        self.lengths = torch.randint(0, P + 1, (N,), device=device)

    def renew(self) -> None:
        """Other values in the same tensors."""
        with torch.no_grad():
            for tensor in (*self.leaves, self.grad_out):
                tensor.normal_()
            self.ids.copy_(torch.randint_like(self.ids, -1, len(self.lengths)))
            self.lengths.copy_(torch.randint_like(self.lengths, 0, self.leaves[3].shape[2] + 1))

    def __call__(self, backend: str = "triton") -> tuple[Tensor, ...]:
        plan = prefix_fast.make_plan(self.ids, len(self.lengths))
        out = prefix_fast.prefix_attention(
            *self.leaves, prefix_ids=self.ids, prefix_lengths=self.lengths, plan=plan, backend=backend
        )
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out))


@pytest.mark.parametrize(
    "case",
    [
        Case(B=16, H=4, Hkv=2, Tq=256, Tk=256, P=1024, D=64, dtype=torch.bfloat16),
        Case(B=16, H=4, Hkv=2, Tq=256, Tk=256, P=40, D=64, dtype=torch.bfloat16),
        Case(B=9, H=4, Hkv=1, Tq=100, Tk=130, N=3, P=500, D=128, ids="random", lengths="random", dtype=torch.float16),
        Case(B=33, H=8, Hkv=2, Tq=1, Tk=40, P=2000, D=128, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_every_run_gives_the_same_bits(case: Case, device: str) -> None:
    if INTERPRETED:
        small = {"B": 2, "H": 2, "Hkv": 1, "Tq": min(case.Tq, 9), "Tk": 9, "P": 40, "D": 16}
        case = replace(case, **small)
    problem = make_problem(case, device)
    grads = output_grads(problem)
    first = evaluate(problem, "triton", grads)
    for _ in range(1 if INTERPRETED else 10):
        again = evaluate(problem, "triton", grads)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@card
def test_a_captured_graph_gives_the_results_of_other_values() -> None:
    step = Step("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        step.renew()
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)
    reference = step("reference")
    for found, expected in zip(captured, reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@card
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_call_never_waits_for_the_device(tokens: int) -> None:
    step = Step("cuda", T=tokens, P=700)
    step()  # the first one compiles and loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            step.ids.sum().item()  # the mode works
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@card
@pytest.mark.parametrize("tokens", [1, 100])
def test_other_sizes_compile_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kw: bool(compiled.append(kw["repr"])))
    Step("cuda", T=tokens, P=1500, D=96)()
    assert compiled  # the hook works
    longer = (1, 1, 1) if tokens == 1 else (128, 133, 256)  # few queries of few readers have one tile
    for (B, P, N), T in zip(((7, 1600, 3), (16, 1501, 4), (5, 1777, 16)), longer, strict=True):
        compiled.clear()
        Step("cuda", B=B, T=T, P=P, N=N, D=96)()
        assert compiled == [], (B, T, P, N)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_compiled_function_equals_the_plain_one(tokens: int, device: str) -> None:
    """fullgraph: nothing of the operator breaks the graph."""
    step = Step(device, B=2, T=tokens, P=40, D=16)

    def forward(*leaves: Tensor) -> Tensor:
        out = prefix_fast.prefix_attention(*leaves, prefix_ids=step.ids, prefix_lengths=step.lengths, backend="triton")
        return out * 2

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)
    results = []
    for function in (forward, compiled):
        out = function(*step.leaves)
        results.append((out.detach(), *torch.autograd.grad(out, step.leaves, step.grad_out)))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@card
@pytest.mark.parametrize("which", ["bank", "rows"])
def test_more_than_two_to_the_31_elements(which: str) -> None:
    """The last rows and segments, beyond every 32-bit offset, against the oracle on those alone."""
    P, D = 512, 128
    count = 2**31 // (P * D) + 100
    needed = {"bank": 5, "rows": 9}[which] * count * P * D * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    B, N, T = (8, count, 64) if which == "bank" else (count, 1, P)
    rows = [torch.randn(B, 1, T, D, device="cuda", dtype=torch.float16).requires_grad_() for _ in range(3)]
    bank = [torch.randn(N, 1, P, D, device="cuda", dtype=torch.float16).requires_grad_() for _ in range(2)]
    ids = N - 1 - torch.arange(B, device="cuda") % min(N, 2)
    out = prefix_fast.prefix_attention(*rows, *bank, prefix_ids=ids, backend="triton")
    grad_out = torch.zeros_like(out)
    grad_out[-3:].normal_()
    grads = torch.autograd.grad(out, (*rows, *bank), grad_out)
    few = [leaf.detach()[-3:].float().requires_grad_() for leaf in (*rows, *bank)]
    expected = prefix_fast.prefix_attention(*few, prefix_ids=ids[-3:] - N + len(few[3]), backend="reference")
    expected_grads = torch.autograd.grad(expected, few, grad_out[-3:].float())
    torch.testing.assert_close(out[-3:].float(), expected, rtol=1e-2, atol=1e-2)
    for found, true in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found[-3:].float(), true, rtol=2e-2, atol=2e-2)


@card
def test_the_tensors_device_counts_and_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    torch.manual_seed(3)
    first = Step("cuda:0")
    second = Step("cuda:1")
    for mine, given in zip(
        (*second.leaves, second.grad_out, second.ids, second.lengths),
        (*first.leaves, first.grad_out, first.ids, first.lengths),
        strict=True,
    ):
        mine.data.copy_(given.data)
    assert torch.cuda.current_device() == 0
    for a, b in zip(first(), second(), strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-2, atol=1e-2)


@card
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str, folder: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or torch.version.hip is not None:
        pytest.skip("compute-sanitizer is not on the path")
    seeds = ("0", "6") if tool == "memcheck" else ("0", "2")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        folder / "gpu" / "device_calls.py",
        *seeds,
    ]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0 and "0 failures" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
