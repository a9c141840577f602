"""Gradient checkpointing of a patched model: the function that runs a layer, and inputs that need no gradient.

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"keep_attention": True})

keeps the attention of every layer between forward and backward (`kept`), as do Trainer's arguments of that name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prefix_fast.kept import keep_attention

STATE = "_prefix_fast"  # in a patched model's __dict__: its HostState
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


def leave_out_input_grads(model: Any) -> None:
    """Turn a call of `enable_input_require_grads` before patch into one of the patched model."""
    hooks = [*(getattr(model, "_require_grads_hooks", None) or ()), getattr(model, "_require_grads_hook", None)]
    if any(hook is not None and hook.id in (hook.hooks_dict_ref() or {}) for hook in hooks):
        model.disable_input_require_grads()
        model.enable_input_require_grads()


class Checkpointed:
    """What a patched model does otherwise than its class when gradient checkpointing is switched on."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs: Any
    ) -> None:
        if gradient_checkpointing_func is not None:
            checkpoint = checkpoint_function(gradient_checkpointing_func, type(self).__name__)
            kwargs["gradient_checkpointing_func"] = checkpoint
        super()._set_gradient_checkpointing(enable, **kwargs)  # type: ignore[misc]

    def enable_input_require_grads(self) -> None:
        """Lets the embeddings require gradients only where a layer runs reentrant checkpointing, which needs it.

        transformers and PEFT call this together with gradient checkpointing. Of the non-reentrant kind, the only one
        with which the prefix gets a gradient, no layer needs it, and nothing is computed below the first prefix.
        """
        if needs_input_grads(self):
            super().enable_input_require_grads()  # type: ignore[misc]
        else:
            self.__dict__[STATE].input_grads = True

    def disable_input_require_grads(self) -> None:
        """As of the class."""
        self.__dict__[STATE].input_grads = False
        super().disable_input_require_grads()  # type: ignore[misc]
