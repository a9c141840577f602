"""No language model class of the installed transformers is wrong in silence; SUPPORTED.md says what each one does."""

import pytest
import transformers
from supported_classes import FILE, classes, try_all, written

LISTED = FILE.read_text() if FILE.exists() else ""
# transformers of another version has other classes, and the file is not about it.
same_release = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in LISTED,
    reason=f"SUPPORTED.md is not about transformers {transformers.__version__}",
)
SAMPLE = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "BertLMHeadModel", "RobertaForCausalLM", "Phi3ForCausalLM",
    "CohereForCausalLM", "Gemma3ForCausalLM", "GPTBigCodeForCausalLM", "MixtralForCausalLM",
    "ModernBertDecoderForCausalLM", "BartForConditionalGeneration", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration", "MarianMTModel", "FalconForCausalLM", "GPTJForCausalLM", "MambaForCausalLM",
    "DeepseekV3ForCausalLM", "DogeForCausalLM", "StableLmForCausalLM", "Gemma4ForCausalLM",
    "LEDForConditionalGeneration", "Qwen3NextForCausalLM",
)  # fmt: skip


def faults(tried):
    return [entry for entry in tried if entry.outcome.startswith("ERROR")]


def test_a_sample_of_classes_is_equal_or_refused():
    tried = try_all([name for name in SAMPLE if name in classes()])
    assert not faults(tried)
    assert {"equal"} < {entry.outcome for entry in tried}


@same_release
def test_the_file_says_what_the_sample_does():
    lines = set(LISTED.splitlines())
    for entry in try_all(SAMPLE):
        line = f"- {entry.name}" if entry.outcome == "equal" else f"| {entry.name} | {entry.outcome} |"
        assert line in lines, f"{line!r} is not in SUPPORTED.md: python -I tests/supported_classes.py --write"


@pytest.mark.slow
def test_every_class_is_equal_or_refused():
    assert not faults(try_all(classes()))


@pytest.mark.slow
@same_release
def test_the_file_is_about_every_class():
    assert written(try_all(classes())) == LISTED, "write it again: python -I tests/supported_classes.py --write"
