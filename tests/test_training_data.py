"""Texts become examples, examples become token rows; what cannot be read is refused by name."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_inputs import PAIRS, tiny_tokenizer, write_jsonl

from prefix_fast.training import named, pydoc
from prefix_fast.training.collate import BatchOrder, RowFormat, RowTokenizer, collate_generation, collate_training
from prefix_fast.training.data import Data, load_data
from prefix_fast.training.tables import Example, read_table


def text_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Reading


def test_csv_and_jsonl_give_the_same_examples(tmp_path):
    csv = text_file(tmp_path, "a.csv", 'facts,text\n"name[A], area[B]","It is, say, ""A""."\nb,c\n')
    jsonl = write_jsonl(
        tmp_path / "a.jsonl", [{"facts": "name[A], area[B]", "text": 'It is, say, "A".'}, {"facts": "b", "text": "c"}]
    )
    expected = [Example("name[A], area[B]", ('It is, say, "A".',)), Example("b", ("c",))]
    assert read_table(csv, "facts", "text") == read_table(jsonl, "facts", "text") == expected


def test_lists_are_sentences_of_a_source_and_references_of_a_target(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"source": ["One.", "Two."], "target": ["first", "second", " "]}])
    assert read_table(path, "source", "target") == [Example("One. Two.", ("first", "second"))]


def test_rows_with_an_empty_field_are_left_out(tmp_path):
    path = text_file(tmp_path, "a.csv", "source,target\n,b\nc,\nd,e\n")
    assert read_table(path, "source", "target") == [Example("d", ("e",))]


def test_file_holds_out_whole_sources(tmp_path):
    rows = [{"source": f"s{i}", "target": f"t{i}{letter}"} for i in range(40) for letter in "ab"]
    data = load_data(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    held_out = {example.source for example in data.validation}
    assert len(held_out) == 2 and data.validation == data.test
    assert all(len(example.targets) == 2 for example in data.test)
    assert not held_out & {example.source for example in data.train}
    assert len(data.train) == 76 and all(len(example.targets) == 1 for example in data.train)
    assert load_data(str(tmp_path / "a.jsonl")) == data


def test_e2e_is_read_from_a_local_folder(tmp_path, monkeypatch):
    folder = tmp_path / "e2e_nlg"
    folder.mkdir()
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        text_file(folder, name, '"mr","ref"\n"name[A]","A is there."\n"name[A]","There is A."\n')
    monkeypatch.setenv("PREFIX_FAST_DATA", str(tmp_path))
    data = load_data("e2e")
    assert data.train == [Example("name[A]", ("A is there.",)), Example("name[A]", ("There is A.",))]
    assert data.test == [Example("name[A]", ("A is there.", "There is A."))]


def test_named_set_comes_from_the_hub_where_there_is_no_folder(monkeypatch):
    row = {"tripleset": [["A", "knows", "B"], ["B", "is", "c"]], "target": "one", "references": ["one", "two"]}
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return {"train": [row], "validation": [row], "test": [row]}

    monkeypatch.delenv("PREFIX_FAST_DATA", raising=False)
    monkeypatch.setattr(named, "hub_is_reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load_data("dart")
    assert data.train == [Example("A | knows | B B | is | c", ("one",))]
    assert data.test == [Example("A | knows | B B | is | c", ("one", "two"))]
    assert asked["name"] == "GEM/dart"


# Refusing


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", r"expected a column 'source' in a\.csv, line 2 has \['x', 'y'\]; name the columns"),
        ("a.csv", "", r"expected at least one row with a source and a target in a\.csv, got none"),
        ("a.csv", "source,target\n", r"expected at least one row with a source and a target in a\.csv, got none"),
        ("a.csv", "source,target\n,\n", r"expected at least one row with a source and a target in a\.csv, got none"),
        ("a.csv", "source,target\na,b,c\n", r"expected 2 fields a line in a\.csv, line 2 has another number"),
        ("a.csv", "source,target\na\n", r"expected 2 fields a line in a\.csv, line 2 has another number"),
        (
            "a.csv",
            'source,target\n"a" b,c\n',
            r"comma-separated values in a\.csv, got something else near line 2",
        ),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source"\n', r"a JSON object .* of a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '["a", "b"]\n', r"expected a JSON object on every line of a\.jsonl, line 1 is a list"),
        ("a.jsonl", '{"source": "a"}\n', r"expected a column 'target' in a\.jsonl, line 1 has \['source'\]"),
        ("a.jsonl", '{"source": 3, "target": "b"}\n', r"in column 'source', a\.jsonl line 1 has 3; choose another"),
        (
            "a.jsonl",
            '{"source": "a", "target": ["b", null]}\n',
            r"column 'target', a\.jsonl line 1 has \[\"b\", null\]",
        ),
        ("a.jsonl", '{"source": "a", "target": []}\n', r"expected at least one row .* in a\.jsonl, got none"),
        ("a.txt", "a\n", r"expected e2e, .*, pydoc, or a \.csv or \.jsonl file, got '.*a\.txt'; correct the name"),
    ],
)
def test_malformed_file_is_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_data(str(text_file(tmp_path, name, text)))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"read_table: expected a file, got .*none\.csv, which is none"):
        load_data(str(tmp_path / "none.csv"))


def test_missing_data_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"load_data: expected a folder of data sets, got '.*nowhere'; check the path"):
        load_data("e2e", data_dir=tmp_path / "nowhere")


def test_incomplete_data_folder_is_refused(tmp_path):
    (tmp_path / "scitldr").mkdir()
    (tmp_path / "scitldr" / "other.txt").touch()
    message = r"expected train\.jsonl in .*scitldr for the data set 'scitldr', got \['other\.txt'\]; rename or add"
    with pytest.raises(ValueError, match=message):
        load_data("scitldr", data_dir=tmp_path)


def test_named_set_without_folder_or_hub_is_refused(monkeypatch):
    monkeypatch.delenv("PREFIX_FAST_DATA", raising=False)
    monkeypatch.setattr(named, "hub_is_reachable", lambda: False)
    with pytest.raises(ValueError, match=r"the data set 'xsum' in a local folder or on the hub, got neither .*xsum/"):
        load_data("xsum")


def test_hub_failure_is_reported_in_one_line(monkeypatch):
    def load_dataset(name, **options):
        raise ConnectionError("gone\nfor good")

    monkeypatch.delenv("PREFIX_FAST_DATA", raising=False)
    monkeypatch.setattr(named, "hub_is_reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"'xsum' at EdinburghNLP/xsum on the hub, got ConnectionError \(gone\); try"):
        load_data("xsum")


def test_columns_of_a_named_set_are_refused():
    with pytest.raises(ValueError, match=r"expected no column names with the data set 'pydoc'.* got 'text'; leave out"):
        load_data("pydoc", target_column="text")


def test_unknown_or_empty_split_is_refused():
    data = Data("x", [Example("a", ("b",))], [], [])
    with pytest.raises(ValueError, match=r"expected 'train', 'validation' or 'test', got 'dev'; choose one of them"):
        data.split("dev")
    with pytest.raises(ValueError, match=r"expected examples in split 'test' of x, got none; use another"):
        data.split("test")


# pydoc


@pytest.fixture(scope="module")
def pydoc_splits():
    return pydoc.pydoc_examples()


def test_pydoc_is_deterministic_large_enough_and_imports_nothing(pydoc_splits):
    before = set(sys.modules)
    first = pydoc.pydoc_examples()
    assert set(sys.modules) == before
    assert first == pydoc_splits
    assert len(first["train"]) > 2000 and len(first["validation"]) > 30 and len(first["test"]) > 30


def test_pydoc_holds_out_modules_and_their_texts(pydoc_splits):
    targets = {name: {example.targets for example in examples} for name, examples in pydoc_splits.items()}
    assert not targets["train"] & (targets["validation"] | targets["test"])


def test_pydoc_pairs_signature_and_description_with_the_summary(tmp_path):
    source = '''
class Box(Base):
    def open(self, key: str = "k", *, slowly=False) -> bool:
        """Open the box with a key.

        Slowly if asked.
        """
    def shut(self):
        """shut it"""
    def two(self):
        """A summary that goes on
        over two lines of text.
        """
'''
    path = text_file(tmp_path, "box.py", source)
    (example,) = pydoc._module_examples("box", path)
    assert example == Example(
        "def box.Box.open(self, key: str='k', *, slowly=False) -> bool\nSlowly if asked.", ("Open the box with a key.",)
    )


# Rows and batches


def decode(tokenizer, ids):
    return tokenizer.decode([int(i) for i in ids])


def test_row_is_source_separator_target_eos():
    tokenizer = tiny_tokenizer()
    row = RowTokenizer(tokenizer, RowFormat(" => ")).row(Example("name[place 1]", ("Place 1.", "unused")))
    assert decode(tokenizer, row.source_ids) == "name[place 1] => "
    assert decode(tokenizer, row.target_ids) == "Place 1.<eos>"


def test_long_source_loses_its_end_and_keeps_the_separator():
    tokenizer = tiny_tokenizer()
    row = RowTokenizer(tokenizer, RowFormat("#", max_source_tokens=2)).row(Example("name[place 1]", ("a",)))
    assert row.source_ids == tokenizer("name[place 1]").input_ids[:2] + tokenizer("#").input_ids


def test_long_target_loses_its_end_and_then_has_no_eos():
    tokenizer = tiny_tokenizer()
    rows = RowTokenizer(tokenizer, RowFormat(max_target_tokens=4))
    assert rows.row(Example("a", ("xyz",))).target_ids == [*tokenizer("xyz").input_ids, tokenizer.eos_token_id]
    assert rows.row(Example("a", ("wxyz",))).target_ids == tokenizer("wxyz").input_ids


def test_training_batch_labels_targets_only_and_pads_right():
    rows = RowTokenizer(tiny_tokenizer(), RowFormat()).rows(
        [Example(s, (t,)) for s, t in PAIRS[:1]] + [Example("a", ("b",))]
    )
    batch = collate_training(rows, pad_token_id=1)
    for index, row in enumerate(rows):
        start, length = len(row.source_ids), len(row)
        assert batch["input_ids"][index, :length].tolist() == row.source_ids + row.target_ids
        assert batch["labels"][index, start:length].tolist() == row.target_ids
        labelled = batch["labels"][index] != -100
        assert labelled.sum() == len(row.target_ids) and labelled[start:length].all()
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (len(rows[0]) - length)
        assert (batch["input_ids"][index, length:] == 1).all()


def test_generation_batch_pads_left():
    batch = collate_generation([[5, 6, 7], [8]], pad_token_id=1)
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [1, 1, 8]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [0, 0, 1]]))


@pytest.mark.parametrize("bucket", [0, 3])
def test_every_epoch_reads_every_row_once_in_another_order(bucket):
    order = BatchOrder([i % 7 for i in range(23)], batch_size=4, seed=1, bucket=bucket)
    epochs = [[order[epoch * 6 + i] for i in range(6)] for epoch in range(2)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(23))
    assert epochs[0] != epochs[1]
    assert order[3] == BatchOrder([i % 7 for i in range(23)], 4, 1, bucket)[3]


def test_bucketing_removes_padding():
    lengths = [(37 * i) % 101 for i in range(256)]

    def padding(bucket):
        order = BatchOrder(lengths, 8, 0, bucket)
        return sum(8 * max(lengths[i] for i in order[n]) - sum(lengths[i] for i in order[n]) for n in range(32))

    assert padding(16) < 0.3 * padding(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowFormat(max_source_tokens=0), r"RowFormat: expected max_source_tokens >= 1, got 0; raise it"),
        (lambda: RowFormat(max_target_tokens=-2), r"RowFormat: expected max_target_tokens >= 1, got -2; raise it"),
        (lambda: BatchOrder([], 4, 0), r"BatchOrder: expected at least one row to train on, got none"),
        (lambda: BatchOrder([1], 0, 0), r"BatchOrder: expected batch_size >= 1, got 0; raise it"),
    ],
)
def test_bad_row_or_batch_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_row_without_any_token_is_refused():
    with pytest.raises(ValueError, match=r"expected a source with at least one token, got ''; leave it out"):
        RowTokenizer(tiny_tokenizer(), RowFormat(separator="")).source_ids("")
