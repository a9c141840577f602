"""Gradient checkpointing of a patched model: the function that runs a layer, and inputs that need no gradient.

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"keep_attention": True})

keeps the attention of every layer between forward and backward (`kept`), as do Trainer's arguments of that name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prefix_fast.kept import keep_attention

KEEP = "keep_attention"  # ours among the keywords of `gradient_checkpointing_enable`


def checkpoint_function(checkpoint: Callable, name: str) -> Callable:
    """The checkpointing function with use_reentrant=False and our own keyword, `keep_attention`, carried out.

    Raises:
        ValueError: reentrant checkpointing is asked for. It hides the layers' inputs that are no arguments from
            autograd: the prefix would get no gradient. Or `keep_attention` with another `context_fn`.
    """
    keywords = dict(getattr(checkpoint, "keywords", {}))
    if is_reentrant(checkpoint):
        raise ValueError(
            f"{name}: expected gradient checkpointing with use_reentrant=False, got True, under which the prefix gets"
            " no gradient; leave it out or pass False"
        )
    if keywords.get(KEEP) and keywords.get("context_fn") is not None:
        raise ValueError(
            f"{name}: expected gradient checkpointing with {KEEP} or a context_fn, got both; leave one out, or keep"
            " torch.ops.prefix_fast.segment_attention.default in a policy of your own"
        )
    if isinstance(checkpoint, functools.partial) and KEEP in keywords:
        if keywords.pop(KEEP):
            keywords["context_fn"] = keep_attention
        checkpoint = functools.partial(checkpoint.func, *checkpoint.args, **keywords)
    return checkpoint if "use_reentrant" in keywords else functools.partial(checkpoint, use_reentrant=False)


def is_reentrant(checkpoint: Any) -> bool:
    """Whether a checkpointing function says that it is reentrant."""
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant"))


def needs_input_grads(model: Any) -> bool:
    """Whether a layer runs a checkpointing function that is not known to be non-reentrant.

    Reentrant checkpointing differentiates a layer only if one of its arguments requires a gradient. For the others,
    embeddings that require one make the first layer compute gradients that nothing reads.
    """
    functions = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    return any(getattr(function, "keywords", {}).get("use_reentrant") is not False for function in functions)


def has_input_hooks(model: Any) -> bool:
    """Whether the hooks of transformers' `enable_input_require_grads` are in place."""
    hooks = [*(getattr(model, "_require_grads_hooks", None) or ()), getattr(model, "_require_grads_hook", None)]
    return any(hook is not None and hook.id in (hook.hooks_dict_ref() or {}) for hook in hooks)
