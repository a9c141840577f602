"""Dropout's bits: Philox4x32-10 written out in Python, and the same mask forward and backward."""

from dataclasses import replace

import pytest
import torch
from native_inputs import ISAS, run

from prefix_fast.testing import Case, make_problem

SEED = 0x9E3779B97F4A7C15 - 2**64  # both halves in use


def philox(counter, key):
    """Salmon et al. (2011), ten rounds."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def kept(query, key, stream, set_index, p):
    word = philox([query, key >> 2, stream, set_index], [SEED & 0xFFFFFFFF, (SEED >> 32) & 0xFFFFFFFF])[key & 3]
    return word >= int(p * 2**32)


def test_philox_against_the_known_answers_of_random123():
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [0xFFFFFFFF] * 4
    assert philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("B", "Tq", "own_start"), [(1, 5, 0), (2, 5, 3), (9, 1, 3)], ids=["row", "padded", "decode"])
def test_dropped_weights_are_those_of_philox(isa, B, Tq, own_start, monkeypatch):
    """Equal scores and one-hot values show every weight of every query in out."""
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    p, P, Tk, H = 0.3, 7, 6, 2
    case = Case(B=B, H=H, Hkv=1, Tq=Tq, Tk=Tk, P=P, D=16, dropout_p=p, is_causal=False)
    problem = make_problem(case)
    one_hot = torch.eye(16)
    problem = replace(
        problem,
        query=torch.zeros(B, H, Tq, 16),
        value=one_hot[P : P + Tk].expand(B, 1, -1, -1),
        sets=(replace(problem.sets[0], value=one_hot[:P].expand(1, 1, -1, -1)),),
        key_mask=(torch.arange(Tk) >= own_start).expand(B, -1),
        dropout_seed=torch.tensor([SEED]),
    )
    out = run(problem, gradients=False)["out"]
    visible = P + Tk - own_start
    expected = torch.zeros(B, H, Tq, 16)
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(Tq)).tolist():
        for j in range(P):
            expected[b, h, i, j] = kept(i, j, b * H + h, 0, p)
        for j in range(own_start, Tk):
            expected[b, h, i, P + j] = kept(i, j, b * H + h, 1, p)
    torch.testing.assert_close(out, expected / visible / (1 - p))


@pytest.mark.parametrize("isa", ISAS)
def test_backward_drops_the_same_weights(isa, monkeypatch):
    """dv is the transposed weights times do: with do = one-hot queries it shows every weight again."""
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    problem = make_problem(Case(B=1, H=1, Hkv=1, Tq=16, Tk=16, P=16, D=16, dropout_p=0.4, is_causal=False))
    own, prefix = torch.eye(32)[16:, :], torch.eye(32)[:16, :]
    wide = {name: torch.zeros(1, 1, 16, 32) for name in ("query", "key")}
    problem = replace(
        problem, **wide, value=own.view(1, 1, 16, 32), scale=1.0,
        sets=(replace(problem.sets[0], key=wide["key"], value=prefix.view(1, 1, 16, 32)),),
    )  # fmt: skip
    grad_out = torch.eye(16, 32).view(1, 1, 16, 32)
    monkeypatch.setattr("native_inputs.output_grads", lambda _: (grad_out, torch.zeros(1, 1, 16)))
    results = run(problem)
    weights = results["out"][0, 0]
    torch.testing.assert_close(results["grad.segment0.value"][0, 0, :, :16], weights[:, :16].T)
    torch.testing.assert_close(results["grad.value"][0, 0, :, :16], weights[:, 16:].T)
    assert 0.3 < float((weights == 0).float().mean()) < 0.5
