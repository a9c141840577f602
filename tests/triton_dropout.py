"""Which weights the Triton kernels drop, read off their results bit by bit.

Every score is equal, so a weight is 0 where it is dropped and one positive number where it is kept. One-hot values show
the weights in out; one-hot gradients, keys or queries show them in dv, dq and dk. Run as a program with
TRITON_INTERPRET=1.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from triton_harness import Machine

from prefix_fast.backends import triton
from prefix_fast.backends.problem import Grads, Problem
from prefix_fast.testing import Case, evaluate, float_tensors, make_problem, with_float_tensors

B, H, Tq, Tk, P, D = 2, 2, 40, 20, 37, 64
SEED = 0x9E3779B97F4A7C15 - 2**64  # both halves in use


def philox(counter: list[np.ndarray], key: list[int]) -> list[np.ndarray]:
    """Salmon et al. (2011), ten rounds, on arrays of counters."""
    low_half = np.uint64(0xFFFFFFFF)
    c, k = [np.asarray(word, dtype=np.uint64) for word in counter], list(key)
    for _ in range(10):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (high >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), high & low_half,
            (low >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), low & low_half,
        ]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def kept(keys: int, set_index: int, p: float) -> Tensor:
    """[B, H, Tq, keys]: which weights of one set stay."""
    stream, query, key = np.meshgrid(np.arange(B * H), np.arange(Tq), np.arange(keys), indexing="ij")
    halves = [SEED & 0xFFFFFFFF, (SEED >> 32) & 0xFFFFFFFF]
    four = np.stack(philox([query, key >> 2, stream, np.full_like(key, set_index)], halves), -1)
    word = np.take_along_axis(four, (key & 3)[..., None], -1)[..., 0]
    return torch.from_numpy(word >= int(p * 2**32)).view(B, H, Tq, keys)


def problem_of(p: float, dtype: torch.dtype) -> Problem:
    """Row 0 reads segment 1 and row 1 segment 0, every head its own keys: no two weights are ever added."""
    case = Case(B=B, H=H, Hkv=H, Tq=Tq, Tk=Tk, P=P, D=D, N=2, ids="random", dropout_p=p, is_causal=False, dtype=dtype)
    problem = make_problem(case)
    sets = (replace(problem.sets[0], ids=torch.tensor([1, 0])),)
    return replace(problem, sets=sets, dropout_seed=torch.tensor([SEED]))


def on_tensors(problem: Problem, query: Tensor, keys: Tensor, values: Tensor) -> Problem:
    """The same call on [Tq, D] queries, and on [P + Tk, D] keys and values."""
    named = {
        "query": query.expand(B, H, -1, -1), "key": keys[P:].expand(B, H, -1, -1),
        "value": values[P:].expand(B, H, -1, -1), "segment0.key": keys[:P].expand(2, H, -1, -1),
        "segment0.value": values[:P].expand(2, H, -1, -1),
    }  # fmt: skip
    dtype = problem.query.dtype
    return with_float_tensors(problem, {name: t.to(dtype).contiguous() for name, t in named.items()})


def differentiate(problem: Problem, grad_out: Tensor, cancel: bool) -> dict[str, Tensor]:
    """out and the gradients. `cancel`: give lse the gradient that makes δ zero, so ds is the kept weight alone."""
    machine = Machine(order=1)
    out = machine.uninitialised(problem.query, "out")
    lse = machine.uninitialised(problem.query[..., 0].contiguous(), "lse", torch.float32)
    grads = {name: machine.uninitialised(t, name) for name, t in float_tensors(problem).items()}
    of_sets = ((grads["segment0.key"], grads["segment0.value"]),)
    grad_out = grad_out.to(out.dtype).expand(out.shape)
    with machine.running():
        triton.forward(problem, out, lse)
        grad_lse = (out * grad_out).float().sum(-1) if cancel else None
        wanted = Grads(grads["query"], grads["key"], grads["value"], of_sets)
        triton.backward(problem, out, lse, grad_out.contiguous(), grad_lse, wanted)
    machine.assert_intact()
    return {"out": out, **grads}


def differences(p: float, dtype: torch.dtype) -> list[str]:
    """Names of the results that show another mask than Philox's."""
    problem = problem_of(p, dtype)
    masks = {"prefix": kept(P, 0, p), "own": kept(Tk, 1, p)}
    true = torch.cat([masks["prefix"], masks["own"]], -1)
    of_segments = masks["prefix"].transpose(2, 3)[[1, 0]]  # segment 1 is row 0's
    nothing, first, one_hot = torch.zeros(P + Tk, D), torch.eye(1, D).expand(P + Tk, D), torch.eye(P + Tk, D)
    queries = torch.eye(Tq, D)
    by_value = on_tensors(problem, nothing[:Tq], nothing, one_hot)
    shown = {}
    results = differentiate(by_value, queries, cancel=False)
    shown["out"] = (results["out"][..., : P + Tk], true)
    shown["dv"] = (results["value"][..., :Tq], masks["own"].transpose(2, 3))
    shown["dv of the prefix"] = (results["segment0.value"][..., :Tq], of_segments)
    by_key = differentiate(on_tensors(problem, nothing[:Tq], one_hot, first), first[:1], cancel=True)
    shown["dq"] = (by_key["query"][..., : P + Tk], true)
    by_query = differentiate(on_tensors(problem, queries, nothing, first), first[:1], cancel=True)
    shown["dk"] = (by_query["key"][..., :Tq], masks["own"].transpose(2, 3))
    shown["dk of the prefix"] = (by_query["segment0.key"][..., :Tq], of_segments)
    for backend in ("cpu", "reference"):
        shown[f"out of the {backend} backend"] = (evaluate(by_value, backend)["out"][..., : P + Tk], true)
    return [name for name, (found, mask) in shown.items() if not torch.equal(found > 0, mask)]


def main(arguments: list[str]) -> int:
    """Print what differs, at p = 0.3 (argument "quick") or for all. Returns the number."""
    torch.set_num_threads(1)
    trials = [(0.3, torch.float32), (0.9, torch.float16), (1e-3, torch.float16)]
    if arguments == ["quick"]:
        del trials[1:]
    found = [f"{name} at p={p} in {dtype}" for p, dtype in trials for name in differences(p, dtype)]
    print(*found, f"{len(found)} differences", sep="\n")
    return len(found)
