"""Benchmarks on this machine's GPU: `make bench-gpu`. Training and decoding shapes, each against its rivals.

For every shape the results of all contenders are compared with ours; then those that agree are timed in turns. A rival
that raises, or whose results differ, is listed with the reason. Exits with 1 where ours differs from concatenation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import make_inputs, ours, rivals_of
from report import Result, as_json, as_markdown, machine
from timing import interleaved_seconds, median
from torch import Tensor

from prefix_fast import selfcheck
from prefix_fast.backends.triton_cost import Shape
from prefix_fast.backends.triton_vetting import kind_of
from prefix_fast.prediction import DECODING, TRAINING, label

RESULTS = Path(__file__).resolve().parent.parent / "results" / "gpu.json"
ANCHOR = "concatenation + SDPA"  # the rival whose results must be ours
TOLERANCE = 5e-2  # of the largest value; all accumulate in float32 and round to bfloat16 at different places


def difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of any two results, as a part of the largest value of the first."""
    return max(
        float((a.float() - b.float()).abs().max()) / max(float(a.float().abs().max()), 1e-30)
        for a, b in zip(mine, theirs, strict=True)
    )


def compare(shape: Shape, backward: bool, device: str, backend: str, rounds: int) -> list[Result]:
    """Parity of all contenders on a shape, in bfloat16, then their times."""
    torch._dynamo.reset()  # past its limit of recompilations flex would run uncompiled
    leaves = make_inputs(shape, device, torch.bfloat16, backward)
    mine = ours(leaves, backend)
    grad_out = torch.randn_like(leaves[0]) if backward else None
    expected = mine.comparable(mine.results(grad_out))
    line = partial(Result, label(shape), "forward + backward" if backward else "forward")
    agreeing, failed = {"prefix_attention": (mine, grad_out, None)}, []
    for name, make in rivals_of(shape, leaves).items():
        found = None
        try:
            rival = make()
            given = None if grad_out is None else rival.given(grad_out)
            found = difference(expected, rival.comparable(rival.results(given)))
            if not found <= TOLERANCE:
                raise ArithmeticError(f"differs from ours by {found:.1e} of the largest value")
            agreeing[name] = (rival, given, found)
        except Exception as error:  # whatever limit a rival has is a result
            failed.append(line(name, difference=found, error=f"{type(error).__name__}: {error}"))
    del expected
    runs = [partial(contender.results, given) for contender, given, _ in agreeing.values()]
    seconds = interleaved_seconds(runs, rounds, device)
    own = median(seconds[0])
    return [
        line(name, contender is mine, median(times), min(times), median(times) / own, found)
        for (name, (contender, _, found)), times in zip(agreeing.items(), seconds, strict=True)
    ] + failed


def write(path: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """The JSON so far: a run that is stopped leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(facts, results), indent=1), encoding="utf-8")


def chosen(arguments: argparse.Namespace) -> list[tuple[Shape, bool]]:
    """(shape, with its backward pass) of this run: every Nth, from the Ith on, of those whose label holds the text."""
    every = [(shape, backward) for shape in TRAINING for backward in (False, True)]
    every += [(shape, False) for shape in DECODING]
    part, parts = map(int, arguments.part.split("/"))
    return [(shape, backward) for shape, backward in every if arguments.only in label(shape)][part::parts]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmarks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of each contender")
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes whose label holds it, as 'P8192' or 'Tq1'")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth of them, from the Ith on")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("bench-gpu: no CUDA or ROCm device is visible to torch, so nothing was run\n")
        return 2
    kinds = {kind_of(shape.head_dim, torch.bfloat16, mixed=False) for shape, _ in chosen(options)}
    verdicts = selfcheck.run("cuda", selfcheck.configurations(sorted(kinds, key=str)))
    facts = {**machine("cuda"), "wrong": [f"{c}: {v.failure}" for c, v in verdicts.items() if v.failure is not None]}
    results: list[Result] = []
    for shape, backward in chosen(options):
        found = compare(shape, backward, "cuda", "triton", options.rounds)
        for result in found:
            print(
                f"{result.shape}, {result.mode}, {result.contender}: {result.median_seconds or result.error}",
                flush=True,
            )
        results += found
        write(options.json, facts, results)
    print(f"\n{json.dumps(facts)}\n\n{as_markdown(results)}\n\nJSON: {options.json}")
    return 1 if any(r.contender.startswith(ANCHOR) and r.error is not None for r in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
