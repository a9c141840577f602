"""What the random calls of several backends share: which keys are visible, scores of ±1e4 and what holds of them."""

from dataclasses import replace

import torch
from torch import Tensor

from prefix_fast.backends.problem import Problem
from prefix_fast.testing import errors, float_tensors


def visible_parts(problem: Problem) -> dict[str, Tensor]:
    """For keys and values by name: which of their tokens some query may read, as a mask over all but the last dim."""
    masks = {}
    own = problem.key
    mask = torch.ones(own.shape[:-1], dtype=torch.bool)
    if problem.key_mask is not None:
        mask = problem.key_mask[:, None].expand(mask.shape)
    masks["key"] = masks["value"] = mask
    for index, s in enumerate(problem.sets):
        units = torch.arange(s.count)
        read = torch.isin(units, s.ids) if s.ids is not None else units == 0
        if s.cu_seqlens is None:
            lengths = torch.full((s.count,), s.key.shape[2]) if s.lengths is None else s.lengths
            tokens = (torch.arange(s.key.shape[2]) < lengths[:, None]) & read[:, None]
            mask = tokens[:, None].expand(s.key.shape[:-1])
        else:
            sizes = s.cu_seqlens.diff()
            lengths = sizes if s.lengths is None else s.lengths
            unit = torch.repeat_interleave(units, sizes)
            within = torch.arange(int(sizes.sum())) - s.cu_seqlens[:-1].repeat_interleave(sizes)
            mask = (within < lengths[unit]) & read[unit]
            mask = mask[:, None].expand(s.key.shape[:-1])
        masks[f"segment{index}.key"] = masks[f"segment{index}.value"] = mask
    return masks


def largest_of(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0


def with_large_scores(problem: Problem, largest: float = 1e4) -> Problem:
    """The same call with a scale that lets scores come near ±largest."""
    named = float_tensors(problem)
    norms = {name: largest_of(tensor.float().norm(dim=-1)) for name, tensor in named.items()}
    reach = norms["query"] * max(norm for name, norm in norms.items() if name.endswith("key")) * abs(problem.scale)
    return replace(problem, scale=problem.scale * largest / max(reach, 1e-3))


def compare_large(
    problem: Problem, backend: str, results: dict[str, Tensor], true: dict[str, Tensor], grad_out: Tensor
) -> None:
    """A logit of 1e4 is rounded to 1e-3 of a weight's logarithm.

    δ = Σ_d do_d·o_d has the rounding of o as it is stored; where large logits come from a large scale, that reaches the
    gradients of queries and keys times the scale.
    """
    precision = torch.finfo(problem.query.dtype).eps / 2
    of_delta = precision * largest_of((grad_out.double() * true["out"]).abs().sum(-1))
    named = {name: t for name, t in float_tensors(problem).items() if not name.endswith("value")}
    reach = abs(problem.scale) * max(largest_of(tensor.abs()) for tensor in named.values())
    for name, error in errors(results, true).items():
        largest = max(largest_of(true[name][true[name].isfinite()].abs()), 1.0)
        cancelled = of_delta * reach if name == "grad.query" or name.endswith("key") else 0.0
        if not error <= 2e-2 * largest + cancelled:
            raise AssertionError(
                f"with large scores {name} of {backend} differs by {error:.2e}; its largest number is {largest:.2e}, "
                f"and the rounding of δ {cancelled:.2e}"
            )
