"""A patched model whose rows choose from a bank, against the same model with each row's own prefix alone."""

import copy
import pickle

import pytest
import torch
from models_zoo import FAMILIES, VOCAB, assert_close, make_batch, make_model, make_prefix, twin
from seq2seq_zoo import FAMILIES as SEQ2SEQ
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix, make_whisper

from prefix_fast import Prefix, PrefixBank, PrefixConfig, patch, unpatch

LENGTHS = {"alice": 5, "bob": 1, "nil": 0, "dora": 9}
ROWS = ["dora", None, "alice", "bob", "nil", "alice"]


def make_bank(model, **options):
    return PrefixBank({name: make_prefix(model, size, size) for name, size in LENGTHS.items()}, **options)


def make_site_bank(model, sites=None):
    entries = {}
    for name, size in LENGTHS.items():
        entries[name] = make_site_prefix(model, size, sites)
        torch.manual_seed(size)
        for parameter in entries[name].parameters():
            torch.nn.init.normal_(parameter.data)
    return PrefixBank(entries)


def alone(model, bank, name):
    """The model with one entry as its only prefix, or without."""
    return patch(twin(model), 0 if name is None else twin(bank[name]))


def assert_rows_as_alone(model, batch, expected):
    """Each row of the mixed batch has the logits of its own model, which reads the row's prefix alone."""
    out = model(**batch.arguments(), prefix_ids=ROWS)
    for row, theirs in enumerate(expected):
        one = {name: tensor[row : row + 1] for name, tensor in batch.arguments().items()}
        assert_close(out.logits[row], theirs(**one).logits[0], 1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_equals_its_prefix_alone(family, padding):
    model = make_model(family)
    bank, batch = make_bank(model), make_batch(padding, rows=6, tokens=13)
    expected = [alone(model, bank, name) for name in ROWS]
    patch(model, bank)
    out = model(batch.input_ids, attention_mask=batch.attention_mask, prefix_ids=ROWS).logits
    for row, theirs in enumerate(expected):
        single = theirs(batch.input_ids[row : row + 1], attention_mask=batch.attention_mask[row : row + 1]).logits
        visible = batch.attention_mask[row].bool()
        assert_close(out[row][visible], single[0][visible], 2e-6)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_seq2seq_row_equals_its_prefix_alone(family):
    model = make_seq2seq(family)
    bank, batch = make_site_bank(model), make_seq2seq_batch("right", rows=6, source=13, target=7)
    expected = [alone(model, bank, name) for name in ROWS]
    patch(model, bank)
    assert_rows_as_alone(model, batch, expected)


@pytest.mark.parametrize("sites", [("decoder",), ("encoder",), ("cross", "decoder")], ids="-".join)
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_bank_at_some_sites(family, sites):
    model = make_seq2seq(family)
    bank, batch = make_site_bank(model, sites), make_seq2seq_batch("left", rows=6, source=13)
    expected = [alone(model, bank, name) for name in ROWS]
    patch(model, bank)
    assert_rows_as_alone(model, batch, expected)


def test_whisper_decoder_rows_equal_their_prefixes_alone():
    model = make_whisper()
    bank = make_site_bank(model)
    features = torch.randn(4, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    ids, rows = torch.randint(3, 50, (4, 5)), ["dora", None, "bob", "alice"]
    expected = [alone(model, bank, name) for name in rows]
    patch(model, bank)
    out = model(input_features=features, decoder_input_ids=ids, prefix_ids=rows).logits
    for row, theirs in enumerate(expected):
        single = theirs(input_features=features[row : row + 1], decoder_input_ids=ids[row : row + 1]).logits
        assert_close(out[row], single[0], 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_explicit_positions_and_token_by_token_equal_one_forward(family):
    model = make_model(family)
    bank, batch = make_bank(model), make_batch("left", rows=6, tokens=13)
    patch(model, bank)
    whole = model(batch.input_ids, attention_mask=batch.attention_mask, prefix_ids=ROWS).logits
    cache, steps = None, []
    for end in range(1, batch.input_ids.shape[1] + 1):
        out = model(
            batch.input_ids[:, end - 1 : end],
            attention_mask=batch.attention_mask[:, :end],
            past_key_values=cache,
            prefix_ids=ROWS,
        )
        cache = out.past_key_values
        steps.append(out.logits)
    visible = batch.attention_mask.bool()
    assert_close(torch.cat(steps, dim=1)[visible], whole[visible], 1e-5)
    if family != "opt":
        positions = torch.arange(batch.input_ids.shape[1]).expand(6, -1)
        given = model(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, prefix_ids=ROWS
        ).logits
        assert torch.equal(given, whole)


def test_names_positions_and_tensors_mean_the_same():
    model = make_model("gpt2")
    patch(model, make_bank(model))
    batch = make_batch("none", rows=6)
    names = model(batch.input_ids, prefix_ids=ROWS).logits
    numbers = [3, -1, 0, 1, 2, 0]
    for dtype in (torch.long, torch.int32, torch.int8):
        assert torch.equal(model(batch.input_ids, prefix_ids=torch.tensor(numbers, dtype=dtype)).logits, names)
    assert torch.equal(model(batch.input_ids, prefix_ids=numbers).logits, names)
    assert torch.equal(model(batch.input_ids, prefix_ids=tuple(ROWS)).logits, names)


def test_order_of_rows_and_of_entries_changes_nothing():
    model = make_model("llama")
    bank, batch = make_bank(model), make_batch("none", rows=6)
    other = PrefixBank({name: twin(bank[name]) for name in reversed(bank.names)})
    second = patch(twin(model), other)
    patch(model, bank)
    out = model(batch.input_ids, prefix_ids=ROWS).logits
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = model(batch.input_ids[order], prefix_ids=[ROWS[row] for row in order]).logits
    assert_close(permuted, out[order], 2e-6)
    assert_close(second(batch.input_ids, prefix_ids=ROWS).logits, out, 2e-6)


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "reparametrised"])
@pytest.mark.parametrize("family", ["gpt2", "bart", "t5"])
def test_gradients_go_to_the_prefixes_that_rows_read(family, projection):
    """Each entry's gradient is that of its own rows alone; the sum of losses of single rows is the batch's."""
    seq2seq = family != "gpt2"
    model = make_seq2seq(family) if seq2seq else make_model(family)
    torch.manual_seed(0)
    bank = PrefixBank(
        {n: Prefix(PrefixConfig(p, prefix_projection=projection, encoder_hidden_size=8), model.config)
         for n, p in (("a", 4), ("b", 7), ("unread", 3))}
    )  # fmt: skip
    batch = make_seq2seq_batch("none", rows=5) if seq2seq else make_batch("none", rows=5)
    singles = {name: patch(twin(model), twin(bank[name])) for name in ("a", "b")}
    patch(model, bank).train()
    rows = ["a", "b", None, "b", "a"]

    def loss(host, chosen, **arguments):
        return host(**{n: t[chosen] for n, t in batch.arguments().items()}, num_items_in_batch=7, **arguments).loss

    def total(host, chosen, **arguments):  # T5 and BART know the mean over the batch's labels alone
        mean = loss(host, chosen, **arguments)
        return mean * len(chosen) if seq2seq else mean

    total(model, list(range(5)), prefix_ids=rows).backward()
    for name, host in singles.items():
        total(host.train(), [row for row in range(5) if rows[row] == name]).backward()
        expected = dict(host.prefix.named_parameters())
        for parameter_name, parameter in bank[name].named_parameters():
            assert parameter.grad.any()
            assert_close(parameter.grad, expected[parameter_name].grad, 2e-5)
    assert all(parameter.grad is None for parameter in bank["unread"].parameters())


def test_optimiser_step_moves_only_what_rows_read():
    model = make_model("gpt2")
    bank, batch = make_bank(model), make_batch("none", rows=3)
    patch(model, bank).train()
    optimiser = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in bank.named_parameters()}
    for _ in range(2):
        optimiser.zero_grad()
        model(**batch.arguments(), prefix_ids=["bob", None, "bob"]).loss.backward()
        optimiser.step()
    for name, parameter in bank.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith("bob."))
    assert all(id(key) in {id(p) for p in bank["bob"].parameters()} for key in optimiser.state)
    state = {key: copy.deepcopy(value) for key, value in optimiser.state.items()}
    bank.remove("alice")
    bank.add("eve", make_prefix(model, 3))
    kept = dict(bank["bob"].named_parameters())
    assert all(torch.equal(optimiser.state[p]["exp_avg"], state[p]["exp_avg"]) for p in kept.values())
    assert [name for name, _ in model.named_parameters() if "eve" in name] == [
        "prefix.eve.sites.decoder.keys",
        "prefix.eve.sites.decoder.values",
    ]
    model(**batch.arguments(), prefix_ids=["eve", "bob", None]).loss.backward()
    assert bank["eve"].sites["decoder"].keys.grad.any()


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = make_model("llama")
        bank = make_bank(model)
        patch(model, bank).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        batch = make_batch("left", rows=6, tokens=13)
        model(**batch.arguments(), prefix_ids=ROWS).loss.backward()
        found.append([parameter.grad for parameter in bank.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True) if pair[0] is not None)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in found[0]) == 6


def test_bfloat16_model_reads_float32_entries():
    model = make_model("gpt2", dtype=torch.bfloat16)
    bank, batch = make_bank(model), make_batch("none", rows=6)
    patch(model, bank)
    assert {parameter.dtype for parameter in bank.parameters()} == {torch.float32}
    out = model(batch.input_ids, prefix_ids=ROWS).logits
    theirs = alone(unpatch(model), bank, "dora")
    assert_close(out[0].float(), theirs(batch.input_ids[:1]).logits[0].float(), 2e-2)


@pytest.mark.parametrize("family", ["gpt2", "bart", "t5"])
def test_unpatch_and_patching_again_leave_nothing(family):
    model = make_model(family) if family == "gpt2" else make_seq2seq(family)
    batch = make_batch("left") if family == "gpt2" else make_seq2seq_batch("left")
    before, own_class, flags = (
        model(**batch.arguments()).logits,
        type(model),
        [p.requires_grad for p in model.parameters()],
    )
    bank = make_bank(model) if family == "gpt2" else make_site_bank(model)
    rows = ["dora", "alice", None]
    first = patch(model, bank)(**batch.arguments(), prefix_ids=rows).logits
    single = patch(model, twin(bank["dora"]))(**batch.arguments()).logits
    with pytest.raises(ValueError, match="expected no prefix_ids"):
        model(**batch.arguments(), prefix_ids=rows)
    assert_close(single[0], first[0], 1e-5)
    assert torch.equal(patch(model, bank)(**batch.arguments(), prefix_ids=rows).logits, first)
    unpatch(model)
    assert type(model) is own_class and not hasattr(model, "prefix")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(**batch.arguments()).logits, before)
    assert bank.names == list(LENGTHS)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_copies_and_pickles_choose_too(family):
    model = make_model(family) if family == "gpt2" else make_seq2seq(family)
    batch = make_batch("left") if family == "gpt2" else make_seq2seq_batch("left")
    bank = make_bank(model) if family == "gpt2" else make_site_bank(model)
    patch(model, bank)
    rows = ["dora", "alice", None]
    expected = model(**batch.arguments(), prefix_ids=rows).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.prefix is not bank
        assert torch.equal(other(**batch.arguments(), prefix_ids=rows).logits, expected)
        with torch.no_grad():
            next(other.prefix["dora"].parameters()).zero_()
        assert not torch.equal(other(**batch.arguments(), prefix_ids=rows).logits, expected)
    assert torch.equal(model(**batch.arguments(), prefix_ids=rows).logits, expected)


def test_traced_call_in_one_graph_equals_eager_and_gives_unread_entries_exact_zeros():
    model = make_model("llama")
    bank, batch = make_bank(model), make_batch("none", rows=3)
    patch(model, bank).train()
    ids = torch.tensor([3, -1, 0])
    eager = model(**batch.arguments(), prefix_ids=ids).loss
    eager.backward()
    expected = {name: parameter.grad for name, parameter in bank.named_parameters()}
    bank.zero_grad()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch.arguments(), prefix_ids=ids)
    out.loss.backward()
    assert_close(out.loss, eager, 1e-5)
    for name, parameter in bank.named_parameters():
        if expected[name] is None or name.startswith("nil."):
            assert parameter.grad is not None and not parameter.grad.any()
        else:
            assert_close(parameter.grad, expected[name], 1e-5)


@pytest.mark.parametrize(
    ("prefix_ids", "error", "message"),
    [
        (None, ValueError, "expected prefix_ids"),
        (["dora", "zed", None], ValueError, "'zed'; the bank has 'alice', 'bob', 'nil', 'dora'"),
        (["dora"], ValueError, "each of the 3 rows, got 1"),
        (["dora"] * 6, ValueError, "each of the 3 rows, got 6"),
        ([0, 4, 1], ValueError, r"ids in \[-1, 4\), got 4; the bank has 'alice'"),
        (torch.tensor([0, -2, 1]), ValueError, r"ids in \[-1, 4\), got -2"),
        (torch.tensor([[0, 1, 1]]), ValueError, r"expected \[B\]"),
        (torch.tensor([0.0, 1, 1]), TypeError, "torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "torch.bool"),
        ("dora", TypeError, "expected a list"),
        (3, TypeError, "expected a list"),
        ([0, True, 1], TypeError, "got True"),
        ([0, 1.5, 1], TypeError, "got 1.5"),
    ],
)  # fmt: skip
def test_bad_ids_raise(prefix_ids, error, message):
    model = make_model("gpt2")
    patch(model, make_bank(model))
    batch = make_batch("left")
    with pytest.raises(error, match=message):
        model(batch.input_ids, attention_mask=batch.attention_mask, prefix_ids=prefix_ids)
    with pytest.raises(error, match=message):
        model.generate(batch.input_ids, attention_mask=batch.attention_mask, prefix_ids=prefix_ids, max_new_tokens=2)
    assert model(batch.input_ids, prefix_ids=[None, "bob", "nil"]).logits.shape == (3, 9, VOCAB)


def test_bank_for_another_model_raises_and_changes_nothing():
    model, other = make_model("gpt2"), make_model("llama", num_hidden_layers=3)
    bank = make_bank(other)
    with pytest.raises(ValueError, match=r"entry 'alice'.*num_layers=2.*num_layers=3"):
        patch(model, bank)
    assert not hasattr(model, "prefix") and model.config._attn_implementation == "sdpa"
    patch(other, bank)
    with pytest.raises(ValueError, match=r"entry 'fred'.*num_kv_heads"):
        bank.add("fred", make_prefix(model, 3))
    assert bank.names == list(LENGTHS)


def test_longest_prefix_that_a_row_reads_must_fit_the_position_table():
    model = make_model("gpt2", n_positions=16)
    patch(model, make_bank(model))
    ids = make_batch("none", rows=2, tokens=9).input_ids
    assert model(ids, prefix_ids=["alice", None]).logits.isfinite().all()
    with pytest.raises(ValueError, match="16 positions, got position 17"):
        model(ids, prefix_ids=["alice", "dora"])
    model = make_seq2seq("bart", max_position_embeddings=16)
    patch(model, make_site_bank(model))
    batch = make_seq2seq_batch("none", rows=2, target=9)
    with pytest.raises(ValueError, match="16 positions, got position 17"):
        model(**batch.arguments(), prefix_ids=["alice", "dora"])
