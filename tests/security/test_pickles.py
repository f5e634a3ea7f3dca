"""Objects that run code when they are unpickled, planted where torch unpickles: no command runs them."""

import hashlib
import io
import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_sgopd.checkpoint.restricted import METADATA, load_metadata, restrict_metadata
from megatron_sgopd.common.ownership import check_ours
from megatron_sgopd.errors import ConfigError

from ..checkpoints.conftest import run_all
from ..e2e.conftest import Finished, train


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.mark,)


def plant_metadata(checkpoint: Path, mark: Path) -> None:
    """In place of the metadata."""
    (checkpoint / METADATA).write_bytes(pickle.dumps(Hostile(mark)))


def plant_object(checkpoint: Path, mark: Path) -> None:
    """In place of what Megatron keeps beside the tensors: behind a file's end, where the metadata now points."""
    metadata = load_metadata((checkpoint / METADATA).read_bytes())
    [index] = [index for index in metadata.storage_data if index.fqn.startswith("common_state")]
    place = metadata.storage_data[index]
    stored = io.BytesIO()
    torch.save([Hostile(mark)], stored)
    path = checkpoint / place.relative_path
    place.offset, place.length = path.stat().st_size, len(stored.getvalue())
    with path.open("ab") as file:
        file.write(stored.getvalue())
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def plant_legacy_file(checkpoint: Path, mark: Path) -> None:
    """In the file in which earlier Megatrons kept it."""
    torch.save(Hostile(mark), checkpoint / "common.pt")


PLANTS = (plant_metadata, plant_object, plant_legacy_file)


@pytest.fixture(scope="module")
def converted(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its checkpoint."""
    out = tmp_path_factory.mktemp("converted") / "megatron"
    run_all([["convert", "to-megatron", tiny_models["qwen2"], out, "--verify", "off"]])
    return tiny_models["qwen2"], out


def test_no_command_runs_what_is_planted_in_a_checkpoint(converted: tuple[Path, Path], tmp_path: Path) -> None:
    model, original = converted
    commands: list[list[object]] = []
    marks = []
    for plant in PLANTS:
        folder, mark = tmp_path / plant.__name__, tmp_path / f"{plant.__name__}.executed"
        shutil.copytree(original, folder)
        plant(folder / "release", mark)
        marks.append(mark)
        commands += [
            ["inspect", folder],
            ["diff", folder, model],
            ["convert", "to-hf", folder, tmp_path / f"{plant.__name__}_hf", "--like", model],
        ]
    finished = run_all(commands, succeed=False)
    assert [mark.name for mark in marks if mark.exists()] == []
    for words, result in zip(commands, finished, strict=True):
        assert "Traceback" not in result.errors, (words, result.errors)
    refused = [words for words, result in zip(commands, finished, strict=True) if result.code == 2]
    assert [words[0] for words in refused].count("inspect") == len(PLANTS), "each is named where it is looked at"


def test_torchs_own_reader_takes_no_other_class_once_it_is_restricted(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    plant_metadata(tmp_path, mark)
    restrict_metadata()
    with pytest.raises(ConfigError, match=r"names pathlib\S*Path\S*, which has no place there"):
        FileSystemReader(tmp_path).read_metadata()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["/etc/hostname", "../other/__0_0.distcp", "link"])
def test_metadata_that_leads_out_of_its_folder_is_refused(
    name: str, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    shutil.copytree(converted[1] / "release", folder)
    (folder / "link").symlink_to("/etc/hostname")
    metadata = load_metadata((folder / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    restrict_metadata()
    with pytest.raises(ConfigError, match="not a file of its own folder"):
        FileSystemReader(folder).read_metadata()


@pytest.mark.long
@pytest.mark.parametrize("plant", PLANTS)
def test_training_goes_on_from_no_checkpoint_that_would_run_code(
    plant: Any, main_run: Finished, tmp_path: Path
) -> None:
    """Whoever plants something can write the manifest too."""
    folder, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(main_run.folder, folder)
    (folder / "summary.json").unlink()
    saved = sorted((folder / "checkpoints").glob("iter_*"))
    for later in saved[1:]:
        shutil.rmtree(later)
    plant(saved[0], mark)
    manifest = json.loads((saved[0] / "manifest.json").read_text())
    for path in saved[0].iterdir():
        if path.name in manifest["files"]:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            manifest["files"][path.name] = {"bytes": path.stat().st_size, "digest": digest}
    (saved[0] / "manifest.json").write_text(json.dumps(manifest))
    finished = train(folder, {"train.steps": 11, "checkpoint.every": 2, "checkpoint.verify": "digests"})
    assert not mark.exists()
    assert finished.code == 1 or plant is plant_legacy_file, finished.output


# ---- Whose a folder is --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that others can enter, with a file in a folder in it."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("2")
    (tmp_path / "run").chmod(0o755)
    return tmp_path / "run"


def test_a_folder_of_ones_own_is_believed(folder: Path) -> None:
    check_ours(folder, private=True)
    (folder / "checkpoints").chmod(0o777)
    folder.chmod(0o700)  # through which nobody gets there
    check_ours(folder, private=True)


@pytest.mark.parametrize(("mode", "private", "refused"), [(0o757, 0, 1), (0o775, 1, 1), (0o775, 0, 0)])
def test_what_others_can_write_is_not(folder: Path, mode: int, private: bool, refused: bool) -> None:
    (folder / "checkpoints").chmod(mode)
    if not refused:
        check_ours(folder, private)
        return
    with pytest.raises(ConfigError, match=r"run/checkpoints can be written by others.*chmod -R g-w,o-w"):
        check_ours(folder, private)


def test_a_file_of_another_user_is_not(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the right to give files away: run as root")
    os.chown(folder / "checkpoints/latest", 65534, -1)
    with pytest.raises(ConfigError, match=r"latest belongs to another user .number 65534.*choose another run_dir"):
        check_ours(folder, private=True)
    check_ours(folder, private=False)  # of the same group
    os.chown(folder / "checkpoints/latest", 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        check_ours(folder, private=False)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
