"""Nothing is read or written outside of a folder because a link or a name in it says so, and no plant is adopted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from megatron_sgopd.checkpoint.files import Staging, new_file, write_atomically
from megatron_sgopd.checkpoint.torch_dist import CheckpointReader
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import read_architecture
from megatron_sgopd.monitor.lines import halve_steps
from megatron_sgopd.rollout.sources import read_rows

from ..checkpoints.conftest import run_all
from .conftest import NOBODY, STUDENT, change_json

Refused = Callable[..., str]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "id_ed25519"
    path.write_text("a private key")
    path.chmod(0o600)
    return path


# ---- Model folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_link_that_leads_out_of_a_model_folder_is_refused(
    name: str, model: Path, secret: Path, refused: Refused
) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    said = refused("inspect", model)
    assert f"{name} leads out of its folder, to {secret}" in said and "put the file itself there" in said


def test_nothing_of_it_reaches_a_conversions_output(tmp_path: Path, secret: Path) -> None:
    run_all([["convert", "to-megatron", STUDENT, tmp_path / "megatron", "--verify", "off"]])
    like = Path(shutil.copytree(STUDENT, tmp_path / "like"))
    (like / "merges.txt").symlink_to(secret)
    command = ["convert", "to-hf", tmp_path / "megatron", tmp_path / "out", "--like", like]
    [finished] = run_all([command], succeed=False)
    assert finished.code == 2 and "merges.txt leads out of its folder" in finished.errors
    assert not (tmp_path / "out").exists()


def test_a_hub_cache_with_its_blobs_is_taken(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in STUDENT.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert read_architecture(snapshot).num_layers > 0
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(STUDENT / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json leads out of its folder"):
        read_architecture(snapshot)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd"])
def test_an_index_that_names_files_elsewhere_is_refused(name: str, model: Path, refused: Refused) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert f"names files outside its folder: {name}" in refused("inspect", model)


# ---- Data set folders -----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    return folder


def rows(folder: Path) -> list[str]:
    return [row.prompt for row in read_rows(PromptSettings(source=str(folder)), pytest.fail)]


@pytest.mark.parametrize(
    "files",
    [
        "https://elsewhere.example/train.jsonl",
        "hf://datasets/someone/something/train.jsonl",
        "/etc/hostname",
        "../secret.jsonl",
        "~/secret.jsonl",
    ],
)
@pytest.mark.parametrize("form", ["data_files: {0}", "data_files: [{0}]", "data_files: [{{split: train, path: {0}}}]"])
def test_a_card_that_names_files_elsewhere_is_refused(files: str, form: str, data: Path) -> None:
    entry = form.format(json.dumps(files))
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {entry}\n---\n# Data\n")
    with pytest.raises(ConfigError, match=r"README\.md names .*, which is not in its folder: remove that entry"):
        rows(data)


def test_a_card_that_begins_late_is_read_all_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "README.md").write_text("\n---\nconfigs:\n- config_name: default\n  data_files: zip://x.csv::/o.zip\n---\n")
    monkeypatch.chdir(data)
    with pytest.raises(ConfigError, match=r"README\.md names 'zip:"):
        rows(Path())


def test_a_folder_within_a_hub_cache_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--a--b/snapshots/0123/main"
    blobs = tmp_path / "datasets--a--b/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text('{"prompt": "1+1", "answer": "2"}\n')
    (folder / "train.jsonl").symlink_to("../../../blobs/abc")
    assert rows(folder) == ["1+1"]


def test_a_checkpoint_of_links_is_not_read(tmp_path: Path) -> None:
    run_all([["convert", "to-megatron", STUDENT, tmp_path / "victim", "--verify", "off"]])
    (tmp_path / "links/release").mkdir(parents=True)
    for file in (tmp_path / "victim/release").iterdir():
        (tmp_path / "links/release" / file.name).symlink_to(file)
    with pytest.raises(ConfigError, match="leads out of its folder"):
        CheckpointReader(tmp_path / "links/release")


def test_a_card_that_names_its_own_files_is_taken(data: Path) -> None:
    (data / "parts").mkdir()
    (data / "train.jsonl").rename(data / "parts/first.jsonl")
    text = "homepage: https://elsewhere.example\nconfigs:\n- config_name: default\n  data_files: parts/*.jsonl"
    (data / "README.md").write_text(f"---\n{text}\n---\n")
    assert rows(data) == ["1+1"]


def test_a_link_that_leads_out_of_a_data_set_is_refused(data: Path, secret: Path) -> None:
    (data / "more.jsonl").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"more\.jsonl leads out of its folder"):
        rows(data)


def test_a_saved_data_set_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "secret", "answer": "2"}]).save_to_disk(tmp_path / "other")
    datasets.Dataset.from_list([{"prompt": "1+1", "answer": "2"}]).save_to_disk(tmp_path / "saved")
    assert rows(tmp_path / "saved") == ["1+1"]
    [arrow] = (tmp_path / "other").glob("*.arrow")
    change_json(tmp_path / "saved/state.json", _data_files=[{"filename": f"../other/{arrow.name}"}])
    with pytest.raises(ConfigError, match=r"state\.json names '\.\./other/.*which is not in its folder"):
        rows(tmp_path / "saved")


def test_splits_elsewhere_are_refused(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"prompt": "1+1", "answer": "2"}])
    saved.save_to_disk(tmp_path / "other")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    change_json(tmp_path / "saved/dataset_dict.json", splits=["train", "../../other"])
    with pytest.raises(ConfigError, match=r"dataset_dict\.json names '\.\./\.\./other'"):
        rows(tmp_path / "saved")


# ---- What is written ------------------------------------------------------------------------------------


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path, secret: Path) -> None:
    path = tmp_path / "results.json"
    (tmp_path / "results.json.tmp").symlink_to(secret)
    write_atomically(path, b"{}")
    assert secret.read_text() == "a private key" and not path.is_symlink() and path.read_bytes() == b"{}"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "results.json.tmp").symlink_to(secret)
    halve_steps(path)
    assert secret.read_text() == "a private key"
    (tmp_path / "part").symlink_to(secret)
    with new_file(tmp_path / "part") as file:
        file.write(b"x")
    assert secret.read_text() == "a private key"


JOB = {"direction": "to-hf", "source": "here"}


def test_what_a_conversion_finds_in_its_place_is_not_gone_on_with(tmp_path: Path, secret: Path) -> None:
    staging = Staging(tmp_path / "out")
    staging.folder.mkdir()
    (staging.folder / "model.safetensors").write_bytes(b"planted")
    with pytest.raises(ConfigError, match=r"out\.partial was begun by no conversion.*remove the folder"):
        staging.check(JOB, 0)
    shutil.rmtree(staging.folder)
    staging.folder.symlink_to(secret.parent)
    with pytest.raises(ConfigError, match="was begun by no conversion"):
        staging.check(JOB, 0)
    staging.folder.unlink()
    staging.begin(JOB)
    staging.check(JOB, 0)
    assert staging.folder.stat().st_mode & 0o077 == 0, "nobody else gets in before it is done"
    with pytest.raises(ConfigError, match="unfinished work of a conversion with another source"):
        staging.check(JOB | {"source": "there"}, 0)


def test_a_partial_output_of_another_user_is_not_gone_on_with(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the right to give files away: run as root")
    staging = Staging(tmp_path / "out")
    staging.begin(JOB)
    (staging.folder / "model.safetensors").write_bytes(b"planted")
    os.chown(staging.folder / "model.safetensors", NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=r"model\.safetensors belongs to another user.*choose another output"):
        staging.check(JOB, 0)


def test_an_output_gets_its_name_with_nothing_to_be_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment of it, there is the unfinished work with its note, or the whole output."""
    staging = Staging(tmp_path / "out")
    staging.begin(JOB)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    for moment in ("rename", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, moment, killed)
            with pytest.raises(Killed):
                staging.publish()
        if moment == "rename":
            staging.check(JOB, 0)  # goes on
    assert (tmp_path / "out").is_dir() and not staging.folder.exists()
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0, "nobody else's before it is known to be whole"
    again = Staging(tmp_path / "out")
    (tmp_path / "out").rmdir()
    again.check(JOB, 0)
    again.begin(JOB)
    again.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
