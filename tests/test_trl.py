"""TRL's trainers on patched models and patched PeftModels: the losses are those of PEFT's own prefix tuning."""

import copy
from tempfile import TemporaryDirectory

import pytest
import torch
from datasets import Dataset
from models_zoo import make_model, make_peft
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from prefix_fast import patch

# TRL calls its reference so.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained")
STEPS = 3
SETTINGS = {
    "max_steps": STEPS, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "logging_steps": 1,
    "save_strategy": "no", "activation_checkpointing": False, "bf16": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Of words that are numbers."""
    words = Tokenizer(WordLevel({str(word): word for word in range(61)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="2", eos_token="1", unk_token="0")


def patched(made):
    """The PeftModel of `make_peft`, patched, or the plain model with its prefix."""
    model = make_peft("llama")
    if made == "peft":
        return patch(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return patch(make_model("llama"), folder)


def logged(trainer, *names):
    """These figures of every step."""
    trainer.train()
    found = [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in names]
    assert len(found) == STEPS * len(names)
    return found


def texts(count, lengths, seed):
    """Random words, as many texts as asked for."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [lengths[i % len(lengths)] for i in range(count)]
    return [torch.randint(3, 61, (size,), generator=generator).tolist() for size in sizes]


def written(words):
    return " ".join(map(str, words))


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"])
@pytest.mark.parametrize("made", ["model", "peft"])
def test_sft_trainer_trains_as_with_peft(made, options, tokenizer, tmp_path):
    """It gives the model a head of its own and calls the backbone."""
    rows = [{"input_ids": words, "labels": words} for words in texts(6, (5, 9, 7, 12, 6, 8), seed=0)]

    def losses(model, **options):
        config = SFTConfig(
            str(tmp_path), per_device_train_batch_size=2, dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False, **SETTINGS, **options,
        )  # fmt: skip
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        return logged(trainer, "loss")

    # PEFT's prefix does not keep texts in one row apart.
    assert losses(patched(made), **options) == pytest.approx(losses(make_peft("llama")), rel=1e-4)


@pytest.mark.parametrize("made", ["model", "peft"])
def test_dpo_trainer_trains_as_with_peft(made, tokenizer, tmp_path):
    """Its reference is the prefix of the beginning: in a PeftModel another adapter."""
    prompts, chosen, rejected = (texts(6, lengths, seed) for seed, lengths in enumerate([(4,), (5, 7), (6, 4, 3)]))
    rows = [
        {"prompt": written(p), "chosen": f" {written(c)}", "rejected": f" {written(r)}"}
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]

    def figures(model, reference):
        config = DPOConfig(str(tmp_path), per_device_train_batch_size=2, **SETTINGS)
        trainer = DPOTrainer(
            model, reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        return logged(trainer, "loss", "rewards/margins")

    model = patched(made)
    found = figures(model, copy.deepcopy(model) if made == "model" else None)
    assert found == pytest.approx(figures(make_peft("llama"), None), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("made", ["model", "peft"])
def test_grpo_trainer_trains_as_with_peft(made, tokenizer, tmp_path):
    """It generates, and computes the log-probabilities of what was generated."""
    rows = [{"prompt": written(words)} for words in texts(6, (4, 6), seed=0)]
    beta = 0.04 if made == "peft" else 0.0  # the reference is another adapter of a PeftModel

    def variety(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    def figures(model):
        config = GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, beta=beta, seed=3,
            **SETTINGS,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, variety, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        return logged(trainer, "loss", "reward", *(["kl"] if beta else []))

    assert figures(patched(made)) == pytest.approx(figures(make_peft("llama")), rel=1e-3, abs=1e-5)
