"""Objects that run code when they are unpickled, planted where torch unpickles: no command runs them."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_sgopd.checkpoint.restricted import METADATA, load_metadata, restrict_metadata
from megatron_sgopd.checkpoint.torch_dist import CheckpointReader
from megatron_sgopd.cli import main
from megatron_sgopd.common.ownership import check_ours, own_temporary_folder
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import read_architecture
from megatron_sgopd.rollout.bank import RolloutBank, check_identity, writing
from megatron_sgopd.rollout.tokenizer import load_tokenizer

from ..checkpoints.conftest import run_all
from ..e2e.conftest import Finished, train
from ..unit.test_bank import IDENTITY, rollouts
from ..unit.test_report import write_run
from .test_verifiers import record, replay


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
    with pytest.raises(ConfigError, match=r"not a file of its own folder|leads out of its folder"):
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


# ---- Everywhere else ----------------------------------------------------------------------------------------


def hostile_pickle(mark: Path) -> bytes:
    return pickle.dumps(Hostile(mark))


def hostile_archive(mark: Path) -> bytes:
    stored = io.BytesIO()
    torch.save(Hostile(mark), stored)
    return stored.getvalue()


FORMS = (hostile_pickle, hostile_archive)


@pytest.mark.parametrize("form", FORMS)
def test_no_file_of_a_model_folder_is_unpickled(form: Any, model: Path, tmp_path: Path) -> None:
    """In place of each file in turn, and as those that other programs would load."""
    mark = tmp_path / "executed"
    others = ("pytorch_model.bin", "consolidated.00.pth", "training_args.bin", "optimizer.pt", "tokenizer.pkl")
    for name in [*sorted(path.name for path in model.iterdir()), *others]:
        folder = Path(shutil.copytree(model, tmp_path / f"with_{name}"))
        (folder / name).write_bytes(form(mark))
        code = main(["inspect", str(folder)])
        assert code in (0, 2)
        with contextlib.suppress(ConfigError):
            load_tokenizer(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("form", FORMS)
def test_no_file_of_a_bank_or_a_recording_is_unpickled(form: Any, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    with writing(tmp_path / "bank", IDENTITY, "train-0") as writer:
        writer.write(rollouts(range(3)))
    for name in ("bank.json", "train-0-000000.json", "train-0-000000.parquet"):
        bank = Path(shutil.copytree(tmp_path / "bank", tmp_path / f"bank_{name}"))
        (bank / name).write_bytes(form(mark))
        with pytest.raises(ConfigError):
            check_identity(bank, IDENTITY)
            RolloutBank(bank).of("problem 0")
    for name in ("step_000000.json", "step_000000.safetensors"):
        folder = tmp_path / f"recording_{name}"
        folder.mkdir()
        record(folder)
        (folder / name).write_bytes(form(mark))
        with pytest.raises(ConfigError):
            replay(folder)
    assert not mark.exists()


@pytest.mark.parametrize("form", FORMS)
def test_no_file_of_a_run_folder_is_unpickled(form: Any, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    names = ("recipe.yaml", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "attempts.jsonl", "summary.json")
    for name in names:
        run = write_run(tmp_path / name, 3)
        (run / name).write_bytes(form(mark))
        for command in (["status", str(run)], ["report", str(run)], ["inspect", str(run)], ["export", str(run), "out"]):
            assert main(command) in (0, 2)
    assert not mark.exists()


def test_receipts_of_a_conversion_that_was_cut_off_are_not_executed(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Its folder is ours alone; and whoever got in could still not have them executed."""
    mark, out = tmp_path / "executed", tmp_path / "out"
    command = ["convert", "to-megatron", tiny_models["qwen2"], out, "--part-size", "100KB"]
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    run_all([command], prelude=limited, succeed=False)
    receipts = tmp_path / "out.partial/release/receipts"
    receipts.mkdir(parents=True, exist_ok=True)
    for part in range(100):
        (receipts / f"{part:06d}").write_bytes(hostile_pickle(mark))
    [finished] = run_all([command], succeed=False)
    assert finished.code == 2 and "000000 is not what a conversion leaves (it names " in finished.errors
    assert not mark.exists() and not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -1}, "names a place before the beginning of a file"),
        ({"length": 1 << 60}, r"are needed: the checkpoint is not complete"),
        ({"offset": 1 << 60}, r"are needed: the checkpoint is not complete"),
    ],
)
def test_places_in_a_checkpoint_that_are_none(
    change: dict[str, int], message: str, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted[1] / "release", tmp_path / "release"))
    metadata = load_metadata((folder / METADATA).read_bytes())
    place = next(iter(metadata.storage_data.values()))
    for name, value in change.items():
        setattr(place, name, value)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=message):
        CheckpointReader(folder)


@pytest.mark.parametrize("size", [[10**15, 64], [-1, 64], [1, 1]])
def test_tensors_that_do_not_hold_their_blocks(size: list[int], converted: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted[1] / "release", tmp_path / "release"))
    metadata = load_metadata((folder / METADATA).read_bytes())
    entry = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    object.__setattr__(entry, "size", torch.Size(size))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    began = time.monotonic()
    with pytest.raises(ConfigError):
        CheckpointReader(folder).check(read_architecture(converted[0]))
    assert time.monotonic() - began < 5


def test_a_folder_for_what_is_compiled_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows the name of torch's own could have made it before, with what we would execute."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = own_temporary_folder("compiled")
    assert own_temporary_folder("compiled") == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="is another user's, or can be written by others"):
        own_temporary_folder("compiled")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is another user's"):
        own_temporary_folder("compiled")
    if os.geteuid() == 0:
        folder.unlink()
        folder.mkdir(mode=0o700)
        os.chown(folder, 65534, 65534)
        with pytest.raises(ConfigError, match="is another user's"):
            own_temporary_folder("compiled")


def test_platforms_compile_there() -> None:
    ask = "import os; from megatron_sgopd.platform import select; select('cpu')\n"
    ask += "print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    alone = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    words = [sys.executable, "-c", ask]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=alone, timeout=120)
    assert done.stdout.split()[-1].endswith(f"sgopd-torchinductor-{os.geteuid()}")
