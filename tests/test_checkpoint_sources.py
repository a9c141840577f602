"""Where a prefix is read from: folders, Hub ids, and what is neither."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from prefix_fast.prefix import Geometry, Prefix, PrefixConfig

FILES = ["adapter_config.json", "adapter_model.safetensors", "prefix_config.json", "prefix.safetensors"]


def make() -> Prefix:
    return Prefix(PrefixConfig(3, encoder_hidden_size=6), Geometry(num_layers=2, num_kv_heads=2, head_dim=4))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("../somewhere/else", ValueError, "'../somewhere/else', which is neither; check the path"),
        ("/no/such/folder", ValueError, "which is neither"),
        ("name/../../x", ValueError, "which is neither"),
        ("", FileNotFoundError, "adapter_config.json"),
        (Path("no_such_folder"), ValueError, "'no_such_folder', which is neither"),
        (3, TypeError, "expected a folder or a Hub id, got int"),
        (None, TypeError, "expected a folder or a Hub id, got NoneType"),
    ],
    ids=str,
)
def test_source_that_is_no_folder_and_no_hub_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        Prefix.from_pretrained(source)


def test_source_that_is_a_file_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder, got the file .*; pass the folder it is in"):
        Prefix.from_pretrained(tmp_path / FILES[1])


def test_hub_id_that_cannot_be_fetched_says_why(tmp_path: Path) -> None:
    # The tests run with the Hub switched off.
    with pytest.raises(FileNotFoundError, match="got 'someone/prefix': no such folder here, and the Hub answers"):
        Prefix.from_pretrained("someone/prefix", cache_dir=tmp_path)


def test_hub_prefix_fetches_the_four_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = make()
    prefix.save_pretrained(tmp_path)
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = Prefix.from_pretrained("someone/prefix", revision="v1", token="t")
    torch.testing.assert_close(loaded()["decoder"], prefix()["decoder"], rtol=0, atol=0)
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("someone/prefix", "v1", "t")
    assert asked["allow_patterns"] == FILES


def test_push_to_hub_uploads_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, bytes] = {}

    class Answer:
        repo_id, commit_url = "me/prefix", "https://hub/commit/1"

    class FakeApi:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Answer:
            assert (repo_id, private, exist_ok, self.token) == ("prefix", True, True, "secret")
            return Answer()

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Answer:
            assert repo_id == "me/prefix"
            uploaded.update(files(Path(folder_path)))
            return Answer()

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    prefix = make()
    assert prefix.push_to_hub("prefix", private=True, token="secret") == "https://hub/commit/1"
    prefix.save_pretrained(tmp_path)
    assert uploaded == files(tmp_path)
