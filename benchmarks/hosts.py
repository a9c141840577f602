"""GPT-2 with random weights, as the models of the benchmarks, with PEFT's prefix tuning and with ours.

All contenders of a comparison get the same weights and the same prefix: PEFT's file of it is what ours load.
"""

import tempfile
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from prefix_fast import SharedSourceCollator, patch


@dataclass(frozen=True)
class Size:
    """The model and the work. `new` tokens are generated; `tokens` are those of a row before."""

    layers: int
    rows: int
    tokens: int
    prefix: int
    new: int = 0
    vocabulary: int = 50257

    def __str__(self) -> str:
        return f"GPT-2 {self.layers} layers, B{self.rows} T{self.tokens} P{self.prefix}"


STEP = Size(layers=6, rows=8, tokens=128, prefix=200)
LONG_STEP = Size(layers=6, rows=8, tokens=512, prefix=200)
GENERATION = Size(layers=12, rows=16, tokens=8, prefix=1024, new=16)
MANY_ROWS = Size(layers=12, rows=64, tokens=8, prefix=1024, new=8)
REFERENCES = Size(layers=6, rows=32, tokens=80, prefix=20)
QUICK_REFERENCES = Size(layers=1, rows=8, tokens=20, prefix=8, vocabulary=500)
QUICK_STEP = Size(layers=1, rows=2, tokens=16, prefix=8, vocabulary=500)
QUICK_GENERATION = Size(layers=2, rows=2, tokens=4, prefix=16, new=4, vocabulary=500)


def base_model(size: Size) -> GPT2LMHeadModel:
    """GPT-2 with random weights and room for prefix, prompt and new tokens; no dropout, so that results compare."""
    config = GPT2Config(
        n_layer=size.layers,
        vocab_size=size.vocabulary,
        n_positions=max(1024, size.prefix + size.tokens + size.new),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def peft_model(size: Size) -> PeftModel:
    """PEFT's prefix tuning, keys and values as parameters."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size.prefix, prefix_projection=False)
    return get_peft_model(base_model(size), config)


def patched_peft_model(size: Size) -> PeftModel:
    """The same, patched."""
    return patch(peft_model(size))


def patched_model(size: Size) -> nn.Module:
    """The plain model, patched with the prefix of `peft_model`."""
    with tempfile.TemporaryDirectory() as folder:
        peft_model(size).save_pretrained(folder)
        return patch(base_model(size), folder)


def checkpointed_model(size: Size, keep_attention: bool) -> nn.Module:
    """The patched plain model under gradient checkpointing."""
    model = patched_model(size)
    name = "activation_checkpointing_enable"  # of newer releases of transformers
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"keep_attention": keep_attention})
    return model


def half_model(size: Size) -> nn.Module:
    """The patched plain model, computing in bfloat16."""
    model = patched_model(size)
    return patch(model, model.prefix, compute_dtype=torch.bfloat16)


MODELS = {
    "PEFT": peft_model,
    "patch(peft_model)": patched_peft_model,
    "patch(model, prefix)": patched_model,
    "compute_dtype=bfloat16": half_model,
    "checkpointing": partial(checkpointed_model, keep_attention=False),
    "checkpointing, attention kept": partial(checkpointed_model, keep_attention=True),
    "no prefix": base_model,
}


class Step:
    """Forward, backward and AdamW on what the model trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-3)

    def batch(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        raise NotImplementedError

    def __call__(self) -> tuple[Tensor, ...]:
        """One step; the loss before it and the norm of its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**self.batch()).loss
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.trainable]))
        self.optimizer.step()
        return loss.detach(), norm


class TrainingStep(Step):
    """Labels on the second half of each row's positions."""

    def __init__(self, name: str, size: Size) -> None:
        super().__init__(MODELS[name](size))
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(size.vocabulary, (size.rows, size.tokens), generator=generator)
        self.labels = self.input_ids.clone()
        self.labels[:, : size.tokens // 2] = -100

    def batch(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        return {"input_ids": self.input_ids, "labels": self.labels}


class ReferencesStep(TrainingStep):
    """The same with `PER_SOURCE` rows for each source, which is the part of a row without labels."""

    PER_SOURCE = 8

    def __init__(self, shared: bool, size: Size) -> None:
        super().__init__("patch(model, prefix)", size)
        sources, half = self.input_ids[:: self.PER_SOURCE], size.tokens // 2
        self.input_ids[:, :half] = sources[:, :half].repeat_interleave(self.PER_SOURCE, dim=0)
        features = [{"source_ids": row[:half], "target_ids": row[half:]} for row in self.input_ids]
        self.shared = SharedSourceCollator(0)(features) if shared else None

    def batch(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        return super().batch() if self.shared is None else self.shared


class Generation:
    """Greedy generation of `size.new` tokens by GPT-2."""

    def __init__(self, name: str, size: Size) -> None:
        self.model = MODELS[name](size).eval()
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(size.vocabulary, (size.rows, size.tokens), generator=generator)
        self.new = size.new

    def __call__(self) -> tuple[Tensor, ...]:
        """The tokens, prompt included."""
        mask = torch.ones_like(self.input_ids)
        return (
            self.model.generate(
                input_ids=self.input_ids, attention_mask=mask, max_new_tokens=self.new, do_sample=False
            ),
        )
