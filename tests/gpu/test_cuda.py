"""The CUDA kernels on a card: the truth, the same bits every time, captured graphs, streams, no waiting."""

import pytest
import torch
from test_device import Step

from prefix_fast import testing
from prefix_fast.backends import cuda
from prefix_fast.testing import Case, evaluate, make_problem, output_grads

pytestmark = [
    pytest.mark.card,
    pytest.mark.skipif(cuda.availability() is not None, reason=cuda.availability() or "available"),
]
HALF, BFLOAT16 = torch.float16, torch.bfloat16
CASES = [
    Case(B=8, H=4, Hkv=2, Tq=256, Tk=256, P=1024, D=64, dtype=BFLOAT16),
    Case(B=8, H=4, Hkv=2, Tq=256, Tk=256, P=40, D=64, dtype=HALF),  # the fused backward
    Case(B=9, H=4, Hkv=1, Tq=100, Tk=130, N=3, P=500, D=128, ids="random", lengths="random", dtype=HALF),
    Case(B=33, H=8, Hkv=2, Tq=1, Tk=40, P=2000, D=128, dtype=BFLOAT16),  # decode
    Case(B=5, H=8, Hkv=1, Tq=4, Tk=300, P=700, D=64, N=2, ids="random", key_mask="left", dtype=HALF),
    Case(B=3, H=4, Hkv=2, Tq=70, Tk=90, P=33, D=256, dtype=BFLOAT16),
    Case(B=3, H=4, Hkv=2, Tq=70, Tk=90, P=33, D=80, num_sets=2, packed=True, N=2, ids="random", dtype=HALF),
    Case(B=2, H=4, Hkv=2, Tq=70, Tk=90, P=33, D=64, dropout_p=0.2, attn_bias=True,
         options={"window": 40, "softcap": 5.0, "sinks": True}),
    Case(B=2, H=4, Hkv=2, Tq=1, Tk=90, P=300, D=128),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_the_truth(case: Case) -> None:
    testing.check(make_problem(case, "cuda"), "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_run_gives_the_same_bits(case: Case) -> None:
    problem = make_problem(case, "cuda")
    grads = output_grads(problem)
    first = evaluate(problem, "cuda", grads)
    for _ in range(10):
        again = evaluate(problem, "cuda", grads)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_captured_graph_gives_the_results_of_other_values(tokens: int) -> None:
    step = Step("cuda", T=tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step("cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step("cuda")
    for _ in range(3):
        step.renew()
        graph.replay()
        for found, expected in zip(captured, step("cuda"), strict=True):
            assert torch.equal(found, expected)


def test_two_streams_at_once_give_the_bits_of_one() -> None:
    steps = [Step("cuda", T=1, P=3000) for _ in range(2)]
    alone = [step("cuda") for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step("cuda"))
        torch.cuda.synchronize()
        for one, other in zip(found, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_call_never_waits_for_the_device(tokens: int) -> None:
    step = Step("cuda", T=tokens, P=700)
    step("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_of_another_device_than_the_current_one() -> None:
    with torch.cuda.device(0):
        testing.check(make_problem(CASES[3], "cuda:1"), "cuda")
