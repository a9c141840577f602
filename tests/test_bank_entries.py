"""The bank itself: names, adding and removing, loading on demand under a limit, files, bad input."""

import copy
import json
import pickle

import pytest
import torch
from models_zoo import make_batch, make_model, make_prefix, twin

from prefix_fast import Prefix, PrefixBank, patch
from prefix_fast import bank_files as files_of_banks

SIZES = {"alice": 5, "bob": 1, "dora": 9}


@pytest.fixture
def model():
    return make_model("gpt2")


@pytest.fixture
def folders(model, tmp_path):
    """A saved prefix under each name."""
    for seed, (name, size) in enumerate(SIZES.items()):
        make_prefix(model, size, seed).save_pretrained(tmp_path / "saved" / name)
    return {name: tmp_path / "saved" / name for name in SIZES}


def numbers(prefix):
    return [tensor.detach().clone() for tensor in prefix.parameters()]


def same(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def test_packed_states_are_the_entries_one_after_another(model):
    bank = PrefixBank({name: make_prefix(model, size, size) for name, size in SIZES.items()})
    states, choice = bank(["dora", None, "alice", "dora"])
    for part in range(2):
        expected = torch.cat([bank[name]()["decoder"][part].squeeze(1) for name in ("alice", "dora")], dim=2)
        assert torch.equal(states["decoder"][part], expected)
    assert choice.names == ("alice", "dora") and choice.cu_seqlens.tolist() == [0, 5, 14]
    assert choice.ids.tolist() == [1, -1, 0, 1] and choice.lengths.tolist() == [[9], [0], [5], [9]]
    assert bank([None, None]) == ({}, None)


def test_operator_row_is_bitwise_the_same_whoever_else_is_in_the_batch(model):
    """Of the same shape: the same segments, whichever row reads which."""
    from prefix_fast import segment_attention

    bank = PrefixBank({name: make_prefix(model, size, size) for name, size in SIZES.items()})
    states, choice = bank(["alice", "bob", "dora", None])
    keys, values = (part[0] for part in states["decoder"])
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, 4, 6, 8) for _ in range(3))
    expected = segment_attention(query, key, value, choice.segment(keys, values))
    for others in (["alice", "dora", "dora", "bob"], ["alice", "bob", "bob", None]):
        ids = bank(["alice", "bob", "dora", *others])[1].ids[3:]
        other = type(choice).of(ids, choice.names, choice.sizes)
        rows = [row for row, name in enumerate(others) if name == ["alice", "bob", "dora", None][row]]
        found = segment_attention(query, key, value, other.segment(keys, values))
        assert 0 in rows and torch.equal(found[rows], expected[rows])


def test_adding_and_removing_leave_the_others_alone(model):
    bank = PrefixBank({name: make_prefix(model, size) for name, size in SIZES.items()})
    held = {name: (bank[name], numbers(bank[name])) for name in ("alice", "dora")}
    bank.remove("bob")
    bank.add("eve", make_prefix(model, 2))
    assert bank.names == ["alice", "dora", "eve"] == list(bank) and len(bank) == 3 and "bob" not in bank
    for name, (module, before) in held.items():
        assert bank[name] is module and same(numbers(module), before)
    assert {name.split(".")[0] for name, _ in bank.named_parameters()} == {"alice", "dora", "eve"}


def test_bytes_are_those_of_the_parameters(model):
    bank = PrefixBank({name: make_prefix(model, size) for name, size in SIZES.items()})
    layers, heads, dim = 2, 4, 8
    assert bank.nbytes == sum(SIZES.values()) * 2 * layers * heads * dim * 4
    bank.remove("dora")
    assert bank.nbytes == 6 * 2 * layers * heads * dim * 4
    assert PrefixBank().nbytes == 0


@pytest.mark.parametrize("limit", [{"max_loaded": 2}, {"max_bytes": 6000}], ids=["count", "bytes"])
def test_least_recently_read_entry_is_dropped_and_comes_back_equal(model, folders, limit):
    full, bank = PrefixBank(folders), PrefixBank(folders, **limit)
    assert full.loaded == list(SIZES) and bank.loaded == [] and bank.nbytes == 0
    patch(model, bank)
    theirs, ids = patch(twin(model), full), make_batch("none", rows=2).input_ids
    for rows, kept in (
        (["alice", "bob"], ["alice", "bob"]),
        (["bob", "alice"], ["alice", "bob"]),
        (["alice", None], ["alice", "bob"]),
        (["dora", None], {"max_loaded": ["alice", "dora"], "max_bytes": ["dora"]}),
        (["bob", "bob"], ["bob", "dora"]),
    ):
        assert torch.equal(model(ids, prefix_ids=rows).logits, theirs(ids, prefix_ids=rows).logits)
        assert bank.loaded == (kept if isinstance(kept, list) else kept[next(iter(limit))])


def test_one_call_may_read_more_than_the_limit(model, folders):
    bank = PrefixBank(folders, max_loaded=1)
    patch(model, bank)
    model(make_batch("none").input_ids, prefix_ids=list(SIZES))
    assert bank.loaded == list(SIZES)
    bank.add("eve", folders["bob"])
    bank["eve"]
    assert bank.loaded == ["eve"]


def change_in_place(prefix):
    with torch.no_grad():
        next(prefix.parameters()).add_(1.0)


@pytest.mark.parametrize(
    "keep", [change_in_place, lambda p: p.requires_grad_(), lambda p: p.load_state_dict(p.state_dict())],
    ids=["changed", "trainable", "loaded into"],
)  # fmt: skip
@pytest.mark.parametrize("through", ["itself", "copy", "pickle", "device"])
def test_changed_and_trainable_entries_are_never_dropped(folders, keep, through):
    bank = PrefixBank(folders, max_loaded=1)
    assert not any(parameter.requires_grad for parameter in bank["alice"].parameters())
    keep(bank["alice"])
    expected = numbers(bank["alice"])
    bank = {
        "itself": lambda: bank,
        "copy": lambda: copy.deepcopy(bank),
        "pickle": lambda: pickle.loads(pickle.dumps(bank)),
        "device": lambda: bank.to("cpu", torch.float64),
    }[through]()
    bank["bob"], bank["dora"]
    assert bank.loaded == ["alice", "dora"]
    assert same(numbers(bank["alice"]), expected)


@pytest.mark.parametrize("through", ["copy", "pickle", "device"])
def test_unchanged_entries_are_dropped_after_copies_and_moves_too(folders, through):
    bank = PrefixBank(folders, max_loaded=1)
    bank["alice"]
    moved = {"copy": copy.deepcopy, "pickle": lambda b: pickle.loads(pickle.dumps(b)), "device": lambda b: b.to("cpu")}
    bank = moved[through](bank)
    assert bank.loaded == ["alice"]
    bank["dora"]
    assert bank.loaded == ["dora"]


def test_entry_loaded_under_inference_mode_can_be_trained(model, folders):
    bank = PrefixBank(folders, max_loaded=3)
    patch(model, bank)
    batch = make_batch("none", rows=1)
    with torch.inference_mode():
        model.generate(batch.input_ids, prefix_ids=["dora"], max_new_tokens=2, pad_token_id=2)
    bank["dora"].requires_grad_()
    model.train()(**batch.arguments(), prefix_ids=["dora"]).loss.backward()
    assert all(parameter.grad.any() for parameter in bank["dora"].parameters())


@pytest.mark.parametrize("limit", [None, 1])
def test_bank_comes_back_from_its_folder(model, folders, tmp_path, limit):
    bank = PrefixBank({"héloïse & co": make_prefix(model, 3), **folders}, max_loaded=limit)
    bank.save_pretrained(tmp_path / "bank")
    again = PrefixBank.from_pretrained(tmp_path / "bank", max_loaded=limit)
    assert again.names == bank.names
    assert all(same(numbers(again[name]), numbers(bank[name])) for name in bank.names)
    assert same(numbers(Prefix.from_pretrained(tmp_path / "bank" / "dora")), numbers(bank["dora"]))
    rows, ids = ["dora", "héloïse & co", None], make_batch("none").input_ids
    expected = patch(model, bank)(ids, prefix_ids=rows).logits
    assert torch.equal(patch(make_model("gpt2"), tmp_path / "bank")(ids, prefix_ids=rows).logits, expected)


def test_patched_model_saves_the_bank_alone(model, tmp_path):
    bank = PrefixBank({name: make_prefix(model, size) for name, size in SIZES.items()})
    patch(model, bank).save_pretrained(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        [*SIZES, "prefix_bank.json", "model.safetensors"]
    )
    assert PrefixBank.from_pretrained(tmp_path / "run").names == bank.names


def test_saving_again_replaces_the_bank_and_keeps_what_is_not_its_own(model, folders, tmp_path):
    place = tmp_path / "bank"
    PrefixBank(folders).save_pretrained(place)
    (place / "notes.txt").write_text("mine")
    bank = PrefixBank.from_pretrained(place, max_loaded=1)
    bank.remove("bob")
    bank.add("eve", make_prefix(model, 2))
    bank.save_pretrained(place)
    assert sorted(path.name for path in place.iterdir()) == ["alice", "dora", "eve", "notes.txt", "prefix_bank.json"]
    assert same(numbers(PrefixBank.from_pretrained(place)["dora"]), numbers(Prefix.from_pretrained(folders["dora"])))
    (place / "fred").mkdir()
    bank.add("fred", make_prefix(model, 2))
    with pytest.raises(ValueError, match="free place for 'fred'"):
        bank.save_pretrained(place)
    assert PrefixBank.from_pretrained(place).names == ["alice", "dora", "eve"]


@pytest.mark.parametrize("at", range(1, 8))
def test_failing_write_leaves_the_earlier_bank(model, folders, tmp_path, monkeypatch, at):
    """Whichever rename fails: of the folders, of the one to be removed, of the index."""
    import os

    place = tmp_path / "bank"
    PrefixBank(folders).save_pretrained(place)
    before = {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
    bank = PrefixBank({name: make_prefix(model, 2, 9) for name in ("alice", "dora", "eve")})
    replace, calls = os.replace, []

    def failing(source, target):
        if str(target).startswith(str(place)) and ".tmp/" not in str(source):
            calls.append(target)
            if len(calls) == at:
                raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        bank.save_pretrained(place)
    assert {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()} == before


def test_diverged_entry_is_named_and_nothing_is_written(model, tmp_path):
    bank = PrefixBank({"alice": make_prefix(model, 2), "bob": make_prefix(model, 2)})
    with torch.no_grad():
        next(bank["bob"].parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"entry 'bob'.*NaN"):
        bank.save_pretrained(tmp_path / "bank")
    assert list((tmp_path / "bank").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "prefix", "error", "message"),
    [
        (3, None, TypeError, "names to be strings, got 3"),
        ("", None, ValueError, "printable name without dots"),
        ("a.b", None, ValueError, "got 'a.b'"),
        ("a\n", None, ValueError, "printable"),
        ("x" * 201, None, ValueError, "1 to 200"),
        ("alice", None, ValueError, "'alice', which is there"),
        ("zed", 3, TypeError, "'zed' to be a Prefix"),
        ("zed", "/no/such/folder", ValueError, "entry 'zed'.*neither"),
        ("zed", "empty", FileNotFoundError, "entry 'zed'.*adapter_config.json"),
    ],
)
def test_bad_entry_raises_and_changes_nothing(model, tmp_path, name, prefix, error, message):
    bank = PrefixBank({"alice": make_prefix(model, 2)})
    (tmp_path / "empty").mkdir()
    given = make_prefix(model, 2) if prefix is None else tmp_path / prefix if prefix == "empty" else prefix
    with pytest.raises(error, match=message):
        bank.add(name, given)
    assert bank.names == ["alice"] == bank.loaded


@pytest.mark.parametrize("limit", [None, 1])
def test_entries_for_different_models_raise_before_numbers_are_read(model, folders, tmp_path, limit):
    make_prefix(make_model("gpt2", n_layer=3), 2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'zed' to be for the model and sites of the other entries"):
        PrefixBank({**folders, "zed": tmp_path / "other"}, max_loaded=limit)
    with pytest.raises(ValueError, match=r"entry 'zed'.*num_layers=2"):
        PrefixBank({"zed": tmp_path / "other"}, max_loaded=limit, model_config=model.config)


def test_other_bad_input(model, tmp_path):
    bank = PrefixBank({"alice": make_prefix(model, 2)})
    for call in (lambda: bank["zed"], lambda: bank.remove("zed")):
        with pytest.raises(KeyError, match="'zed'; it has 'alice'"):
            call()
    with pytest.raises(ValueError, match="that of another entry"):
        bank.add("same", bank["alice"])
    with pytest.raises(ValueError, match="max_loaded >= 1"):
        PrefixBank(max_loaded=0)
    with pytest.raises(TypeError, match="mapping from names"):
        PrefixBank([make_prefix(model, 2)])
    with pytest.raises(FileNotFoundError, match=r"prefix_bank\.json"):
        PrefixBank.from_pretrained(tmp_path)
    (tmp_path / files_of_banks.INDEX).write_text(json.dumps({"format_version": 9, "names": []}))
    with pytest.raises(ValueError, match="newer prefix_fast"):
        PrefixBank.from_pretrained(tmp_path)


def test_folder_that_is_gone_when_it_is_read_names_the_entry(folders):
    bank = PrefixBank(folders, max_loaded=1)
    (folders["bob"] / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="entry 'bob'"):
        bank(["bob"])
    assert bank.loaded == [] and bank.names == list(SIZES)


def test_trainer_brings_the_ids_with_the_batch(model, tmp_path):
    from transformers import Trainer, TrainingArguments

    bank = PrefixBank({name: make_prefix(model, size) for name, size in SIZES.items()})
    before = {name: numbers(bank[name]) for name in SIZES}
    patch(model, bank)
    batch = make_batch("none", rows=4)
    data = [
        {"input_ids": ids, "labels": labels, "prefix_ids": row % 2, "unused": 1}
        for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.1, report_to=[],
        save_steps=2, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    assert [same(numbers(bank[name]), before[name]) for name in SIZES] == [False, False, True]
    saved = PrefixBank.from_pretrained(tmp_path / "checkpoint-2")
    assert all(same(numbers(saved[name]), numbers(bank[name])) for name in SIZES)
