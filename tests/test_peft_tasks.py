"""Patched PeftModels of classifiers, question answering and features, and cartridges, against the same unpatched."""

import copy
import pickle

import pytest
import torch
from models_zoo import VOCAB, _config, assert_close, make_batch, make_model
from peft_steps import assert_same_files, assert_same_step, assert_same_training, step

from prefix_fast.patching import patch, unpatch

peft = pytest.importorskip("peft")
P, ROWS, LABELS = 5, 3, 4
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
ENCODERS = ("bert", "electra", "ernie", "roc_bert", "roberta", "xlm-roberta", "camembert", "roberta-prelayernorm")
CAUSAL = ("gpt2", "llama", "qwen3", "opt", "gpt_neox", "mistral")


def make(family, task, **options):
    """A PeftModel for the task around a tiny model without dropout."""
    import transformers as hf

    labels = 2 if task == "QUESTION_ANS" else LABELS
    if family in CAUSAL:
        config = _config(family, num_labels=labels, classifier_dropout=0.0)
    else:
        more = {"enable_pronunciation": False, "enable_shape": False} if family == "roc_bert" else {}
        config = hf.AutoConfig.for_model(family, num_labels=labels, classifier_dropout=0.0, **BERT, **more)
    torch.manual_seed(0)
    model = getattr(hf, CLASSES[task]).from_config(config)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **options))


class Inputs:
    """A batch with the labels of a task, as `peft_steps` takes it."""

    def __init__(self, task, padding="left", **more):
        batch = make_batch(padding, rows=ROWS)
        generator = torch.Generator().manual_seed(1)
        labels = {
            "SEQ_CLS": {"labels": torch.randint(0, LABELS, (ROWS,), generator=generator)},
            "TOKEN_CLS": {"labels": torch.randint(0, LABELS, batch.labels.shape, generator=generator)},
            "QUESTION_ANS": {
                "start_positions": torch.tensor([1, 2, 30]),
                "end_positions": torch.tensor([4, 2, 8]),
            },
        }
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        self.all = {**inputs, **labels.get(task, {}), **more}

    def arguments(self):
        return self.all


IN_SHORT = ("gpt2", "llama", "bert", "roberta")
CALLS = [
    pytest.param(family, task, marks=() if family in IN_SHORT else pytest.mark.slow)
    for family in (*CAUSAL, *ENCODERS)
    for task in CLASSES
    if (family, task) != ("opt", "TOKEN_CLS")  # transformers has no such class
]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "task"), CALLS)
def test_steps_or_features_are_equal(family, task, padding):
    theirs = make(family, task, prefix_projection=padding == "left", encoder_hidden_size=16)
    ours, batch = patch(copy.deepcopy(theirs)), Inputs(task, padding)
    if task == "FEATURE_EXTRACTION":
        assert_same_features(ours, theirs, batch.all)
    else:
        assert_same_training(ours, theirs, [batch] * 3)


def assert_same_features(ours, theirs, arguments):
    found, expected = ours(**arguments), theirs(**arguments)
    real = arguments["attention_mask"].bool()
    assert_close(found.last_hidden_state[real], expected.last_hidden_state[real])
    weights = torch.randn(expected.last_hidden_state[real].shape, generator=torch.Generator().manual_seed(2))
    for model, output in ((ours, found), (theirs, expected)):
        (output.last_hidden_state[real] * weights).sum().backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_arguments_as_peft_takes_them(family, task):
    theirs = make(family, task).eval()
    ours = patch(copy.deepcopy(theirs))
    words = theirs.base_model.get_input_embeddings()
    inputs = Inputs(task).all
    ids = inputs.pop("input_ids")
    position_ids = torch.arange(ids.shape[1])[None].expand(ROWS, -1) + 3
    given = {"input_ids": ids, **inputs}
    calls = [
        {**given, "return_dict": False},
        {**given, "position_ids": position_ids},
        {**given, "token_type_ids": torch.ones_like(ids)},
        {**given, "attention_mask": None},
        {**inputs, "inputs_embeds": words(ids).detach()},
    ]
    if (family, task) != ("roberta", "SEQ_CLS"):  # PEFT takes the hidden states for the pooled one there
        calls.append({**given, "output_hidden_states": True})
    for arguments in calls:
        found, expected = ours(**arguments), theirs(**arguments)
        assert type(found) is type(expected)
        for mine, other in zip(tensors(found), tensors(expected), strict=True):
            assert_close(mine, other)


def tensors(output):
    """The tensors of an output, the caches left out: the prefix is no part of ours."""
    parts = output if isinstance(output, tuple) else output.to_tuple()
    return [t for part in parts for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("family", "task"), [("llama", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("gpt2", "QUESTION_ANS")])
def test_the_head_is_trained_saved_and_loaded_as_in_peft(family, task, tmp_path):
    theirs = make(family, task)
    ours, batch = patch(copy.deepcopy(theirs)), Inputs(task)
    trained = {name.split(".")[1] for name, p in ours.named_parameters() if p.requires_grad}
    assert trained & {"score", "classifier", "qa_outputs"}
    assert_same_training(ours, theirs, [batch])
    theirs.load_state_dict(ours.state_dict())
    assert_same_files(tmp_path, ours, theirs)
    again = copy.deepcopy(unpatch(ours).get_base_model())
    loaded = patch(peft.PeftModel.from_pretrained(again, tmp_path / "theirs"))
    assert_close(loaded.eval()(**batch.all).loss, theirs.eval()(**batch.all).loss, 1e-5)


@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("gpt2", "QUESTION_ANS"), ("llama", "TOKEN_CLS")])
def test_copies_and_unpatch(family, task):
    model, batch = make(family, task).eval(), Inputs(task)
    kinds = [type(module) for module in model.modules()]
    expected = step(model, batch)
    patch(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_step(step(again, batch), expected)
    unpatch(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(step(model, batch)[0], expected[0])


def make_cartridge(family="llama", frozen=2, **options):
    torch.manual_seed(0)
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=frozen, **options
    )  # fmt: skip
    return peft.get_peft_model(make_model(family), config)


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cartridges_train_and_generate_as_in_peft(family, frozen, tmp_path):
    theirs = make_cartridge(family, frozen)
    ours = patch(copy.deepcopy(theirs))
    assert_same_training(ours, theirs, [make_batch(padding) for padding in ("left", "right")])
    theirs.load_state_dict(ours.state_dict())
    assert_same_files(tmp_path, ours, theirs)
    batch = make_batch("left")
    loaded = patch(peft.PeftModel.from_pretrained(make_model(family), tmp_path / "ours"))
    for model in (ours, loaded):
        tokens = [
            m.eval().generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=6, pad_token_id=2
            )
            for m in (model, theirs)
        ]
        assert torch.equal(*tokens)


def test_a_cartridge_starts_from_text_and_becomes_a_prefix(tmp_path):
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    model, batch = patch(make_cartridge("llama")).eval(), make_batch("none", rows=1)
    with model.disable_adapter():
        cache = model(input_ids=batch.input_ids, use_cache=True).past_key_values
    legacy = [(layer.keys, layer.values) for layer in cache.layers]
    initialize_kv_prefix_from_past_key_values(model, past_key_values=legacy)
    rest = batch.input_ids[:, P:]
    whole = make_model("llama")(batch.input_ids).logits[:, P:]
    assert_close(model(rest).logits, whole)
    model.save_pretrained(tmp_path)
    assert_close(patch(make_model("llama"), tmp_path).eval()(rest).logits, whole)


def test_several_adapters():
    theirs = make("llama", "SEQ_CLS").eval()
    ours, batch = patch(copy.deepcopy(theirs)), Inputs("SEQ_CLS")
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("longer", peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=7))
    for name in ("longer", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert_close(ours(**batch.all).logits, theirs(**batch.all).logits)
