"""Prefix files: both formats, writes that are whole or not at all, and what is refused when reading."""

import errno
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefix_fast import checkpoint
from prefix_fast.geometry import ModelSites
from prefix_fast.prefix import Geometry, Prefix, PrefixConfig

GEOMETRY = Geometry(num_layers=2, num_kv_heads=2, head_dim=4)
PEFT, NATIVE = ("adapter_config.json", "adapter_model.safetensors"), ("prefix_config.json", "prefix.safetensors")
FORMATS = pytest.mark.parametrize("format", ["peft", "native"])


def make(num_virtual_tokens: int = 3, **fields: Any) -> Prefix:
    return Prefix(PrefixConfig(num_virtual_tokens, encoder_hidden_size=6, **fields), GEOMETRY)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / (PEFT[0] if (folder / PEFT[0]).exists() else NATIVE[0])
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / PEFT[1]
    save_file({"prompt_embeddings": change(load_file(file)["prompt_embeddings"]).contiguous()}, file)


@FORMATS
@pytest.mark.parametrize("num_virtual_tokens", [0, 1, 3], ids=lambda p: f"P{p}")
def test_saved_prefix_loads_folded_with_the_same_numbers(tmp_path: Path, format: str, num_virtual_tokens: int) -> None:
    prefix = make(num_virtual_tokens, prefix_dropout=0.25)
    prefix.save_pretrained(tmp_path / "new" / "folder", format=format)
    loaded = Prefix.from_pretrained(str(tmp_path / "new" / "folder"), model_config=GEOMETRY)
    torch.testing.assert_close(loaded.eval()()["decoder"], prefix.eval()()["decoder"], rtol=0, atol=0)
    # PEFT has no field for the dropout.
    dropout = 0.25 if format == "native" else 0.0
    assert loaded.config == PrefixConfig(num_virtual_tokens, False, 6, dropout)
    assert sorted(files(tmp_path / "new" / "folder")) == sorted(PEFT if format == "peft" else NATIVE)


def test_sites_that_peft_lacks_are_native_and_refused_as_peft(tmp_path: Path) -> None:
    sites = {site: (torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)) for site in ("encoder", "decoder")}
    geometries = dict.fromkeys(sites, GEOMETRY)
    stored = checkpoint.StoredPrefix(ModelSites(geometries, is_encoder_decoder=True), sites)
    with pytest.raises(NotImplementedError, match=r"it has prefixes at \['decoder', 'encoder'\], PEFT has them at"):
        checkpoint.save(stored, tmp_path / "peft", "peft")
    checkpoint.save(stored, tmp_path / "auto")
    assert sorted(files(tmp_path / "auto")) == sorted(NATIVE)
    assert sorted(load_file(tmp_path / "auto" / NATIVE[1])) == [
        "decoder.keys", "decoder.values", "encoder.keys", "encoder.values",
    ]  # fmt: skip
    loaded = Prefix.from_pretrained(tmp_path / "auto")
    assert loaded.config.sites == ("encoder", "decoder") and loaded.model_sites == stored.model_sites
    for site, (keys, values) in sites.items():
        torch.testing.assert_close(loaded()[site], (keys.unsqueeze(1), values.unsqueeze(1)), rtol=0, atol=0)


def test_saving_again_replaces_the_files(tmp_path: Path) -> None:
    make(3).save_pretrained(tmp_path)
    second = make(5)
    second.save_pretrained(tmp_path)
    torch.testing.assert_close(Prefix.from_pretrained(tmp_path)()["decoder"], second()["decoder"], rtol=0, atol=0)


def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


@FORMATS
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("failing", [1, 2], ids=lambda n: f"call-{n}")
@pytest.mark.parametrize("first", [True, False], ids=["new", "over-an-earlier-one"])
def test_write_that_fails_midway_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, call: str, failing: int, first: bool
) -> None:
    if not first:
        make(3).save_pretrained(tmp_path, format=format)
    before, real, calls = files(tmp_path), getattr(os, call), []

    def full_disk(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(OSError, match="No space left"):
            make(5).save_pretrained(tmp_path, format=format)
    assert len(calls) >= failing
    assert files(tmp_path) == before


def test_interrupt_while_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(3).save_pretrained(tmp_path)
    before = files(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(5).save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_diverged_prefix_is_not_saved_over_a_good_one(tmp_path: Path) -> None:
    make(3).save_pretrained(tmp_path)
    before, prefix = files(tmp_path), make(3).fold()
    with torch.no_grad():
        prefix.sites["decoder"].values[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite keys and values, got NaN or infinity at 'decoder'; the training"):
        prefix.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_folder_never_holds_two_prefixes(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "a", format="native")
    with pytest.raises(ValueError, match=r"without files of the native format, got .*prefix_config.json"):
        make().save_pretrained(tmp_path / "a")
    make().save_pretrained(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        file.rename(tmp_path / "b" / file.name)
    with pytest.raises(
        ValueError, match=r"files of the peft and of the native format in .*; name the one with format="
    ):
        Prefix.from_pretrained(tmp_path / "b")
    assert Prefix.from_pretrained(tmp_path / "b", format="native").num_virtual_tokens == 3


def test_save_arguments_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder, got the file .*file; pass a folder"):
        make().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="format to be 'auto', 'peft' or 'native', got 'pickle'"):
        make().save_pretrained(tmp_path, format="pickle")
    assert list(files(tmp_path)) == ["file"]


CONFIG_ERRORS = [
    ({"peft_type": "LORA"}, ValueError, "peft_type to be one of PREFIX_TUNING, CARTRIDGE, got 'LORA'"),
    ({"peft_type": ["PREFIX_TUNING"]}, ValueError, r"got \['PREFIX_TUNING'\]"),
    ({"num_layers": -2}, ValueError, "num_layers >= 1, got -2"),
    ({"num_layers": 2.0}, TypeError, r"num_layers to be an integer, got 2\.0 \(float\)"),
    ({"num_layers": float("inf")}, TypeError, r"num_layers to be an integer, got inf \(float\)"),
    ({"num_layers": True}, TypeError, r"num_layers to be an integer, got True \(bool\)"),
    ({"num_layers": None}, TypeError, "num_layers to be an integer, got None"),
    ({"num_layers": 10**30}, ValueError, r"of shape \(3, 16000000"),
    ({"num_layers": 3}, ValueError, r"'prompt_embeddings' of shape \(3, 48\) as its config says, got \(3, 32\)"),
    ({"num_virtual_tokens": 4}, ValueError, r"of shape \(4, 32\) as its config says, got \(3, 32\)"),
    ({"num_virtual_tokens": "3"}, TypeError, r"num_virtual_tokens to be an integer, got '3' \(str\)"),
    ({"num_attention_heads": 3}, ValueError, "token_dim to be a multiple of num_attention_heads, got 8 and 3"),
    ({"encoder_hidden_size": "wide"}, TypeError, "encoder_hidden_size to be an integer, got 'wide'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONFIG_ERRORS, ids=[str(case[0]) for case in CONFIG_ERRORS])
def test_peft_config_with_wrong_fields_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    make().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format_version": 4}, ValueError, "format_version <= 3, got 4; a newer prefix_fast wrote it"),
        ({"format_version": None}, TypeError, "format_version to be an integer, got None"),
        ({"sites": ["../../etc"]}, ValueError, r"sites to be \['decoder'\], got \['../../etc'\]"),
        ({"sites": "decoder"}, ValueError, r"sites to be \['decoder'\], got 'decoder'"),
        ({"sites": [["decoder"]]}, ValueError, r"sites to be \['decoder'\], got \[\['decoder'\]\]"),
        ({"sites": []}, ValueError, r"sites to be \['decoder'\], got \[\]"),
        ({"format_version": 2}, ValueError, r"sizes of each site, of encoder, .* got sites=\['decoder'\]"),
        ({"format_version": 2, "sites": {"middle": {}}}, ValueError, r"sizes of each site, .* got sites=\{'middle'"),
        ({"format_version": 2, "sites": {"cross": 3}}, ValueError, r"sizes of each site, .* got sites=\{'cross': 3\}"),
        (
            {"format_version": 2, "sites": {"cross": {}}},
            TypeError,
            "site 'cross': expected num_layers to be an integer",
        ),
        ({"head_dim": 0}, ValueError, "head_dim >= 1, got 0"),
        ({"prefix_dropout": "half"}, TypeError, "prefix_dropout to be a number, got 'half'"),
        ({"num_kv_heads": 4}, ValueError, r"'decoder.keys' of shape \(2, 4, 3, 4\) as its config says, got \(2, 2"),
    ],
    ids=str,
)
def test_native_config_with_wrong_fields_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    make().save_pretrained(tmp_path, format="native")
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON in .*adapter_config.json, got Expecting value"),
        (b'{"peft_type": "PREFIX_T', "expected JSON in .*, got Unterminated string"),
        (b"\xff\xfe\x00garbage", "expected JSON in .*; the file is damaged"),
        (b"[1, 2]", "expected a JSON object in .*, got a list"),
        (b"null", "expected a JSON object in .*, got a NoneType"),
        (b"[" * 100_000, "expected JSON in .*; the file is damaged"),
        (b'{"num_layers": ' + b"9" * 10_000 + b"}", "expected JSON in .*; the file is damaged"),
    ],
    ids=["empty", "truncated", "binary", "list", "null", "nested", "endless-number"],
)
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / PEFT[0]).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Prefix.from_pretrained(tmp_path)


def archive(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"prompt_embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        archive(b"{}", length=2**63),
        archive(b"not json"),
        archive(entry(0, 384, [3, 32]), b"\x00" * 200),
        archive(entry(0, 1 << 60, [3, 32]), b"\x00" * 384),
        archive(entry(0, 384, [1 << 62, 1 << 62]), b"\x00" * 384),
        archive(entry(64, 384, [3, 32]), b"\x00" * 384),
    ],
    ids=["empty", "short", "endless-header", "no-json", "truncated", "beyond-the-end", "overflow", "hole"],
)
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / PEFT[1]).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"expected a safetensors file, got .*; it is truncated or no safetensors file"
    ):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_pickle_named_safetensors_is_refused(tmp_path: Path, zipped: bool) -> None:
    make().save_pretrained(tmp_path)
    torch.save({"prompt_embeddings": torch.zeros(3, 32)}, tmp_path / PEFT[1], _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*: a pickle under another name"):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "prefix.pt", "weights.pth", "state.pkl"])
def test_pickled_weights_are_refused_unread_with_the_way_out(tmp_path: Path, name: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / PEFT[1]).unlink()
    (tmp_path / name).write_bytes(b"never opened")
    message = f"got pickled weights ['{name}']"
    with pytest.raises(ValueError, match=re.escape(message) + r".*save_file\(torch\.load\(.*weights_only=True\)"):
        Prefix.from_pretrained(tmp_path)


def test_converted_pickle_loads(tmp_path: Path) -> None:
    prefix = make()
    prefix.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / PEFT[1]), tmp_path / "adapter_model.bin")
    save_file(torch.load(tmp_path / "adapter_model.bin", weights_only=True), tmp_path / PEFT[1])
    torch.testing.assert_close(Prefix.from_pretrained(tmp_path)()["decoder"], prefix()["decoder"], rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    make().save_pretrained(tmp_path)
    edit_tensor(tmp_path, lambda tensor: tensor.index_fill(1, torch.tensor([5]), value))
    with pytest.raises(ValueError, match="expected finite numbers in 'prompt_embeddings', got NaN or infinity"):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.to(torch.int32), TypeError, "in one of F64, F32, F16, BF16, got I32; convert it"),
        (lambda t: t.to(torch.float8_e4m3fn), TypeError, "got F8_E4M3"),
        (lambda t: t.t(), ValueError, r"of shape \(3, 32\) as its config says, got \(32, 3\)"),
        (lambda t: t.flatten(), ValueError, r"of shape \(3, 32\) as its config says, got \(96,\)"),
    ],
    ids=["int32", "float8", "transposed", "flat"],
)
def test_weights_of_another_dtype_or_shape_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], error: type[Exception], message: str
) -> None:
    make().save_pretrained(tmp_path)
    edit_tensor(tmp_path, change)
    with pytest.raises(error, match=message):
        Prefix.from_pretrained(tmp_path)


def test_weights_with_other_names_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    save_file({"embeddings": torch.zeros(3, 32)}, tmp_path / PEFT[1])
    with pytest.raises(ValueError, match=r"expected the tensors \['prompt_embeddings'\], got \['embeddings'\]"):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("present", "found"),
    [([], "an empty folder"), ([PEFT[0]], r"\['adapter_config.json'\]"), (["config.json"], r"\['config.json'\]")],
    ids=["empty", "config-alone", "a-models"],
)
def test_missing_files_are_named_beside_those_found(tmp_path: Path, present: list[str], found: str) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    expected = "adapter_config.json and adapter_model.safetensors or prefix_config.json and prefix.safetensors"
    with pytest.raises(FileNotFoundError, match=f"expected {expected} in .*, got {found}; pass the folder"):
        Prefix.from_pretrained(tmp_path)


def test_format_asked_for_must_be_there(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected prefix_config.json and prefix.safetensors in"):
        Prefix.from_pretrained(tmp_path, format="native")
    with pytest.raises(ValueError, match="format to be 'auto', 'peft' or 'native', got 'json'"):
        Prefix.from_pretrained(tmp_path, format="json")
