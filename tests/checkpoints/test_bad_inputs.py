"""Bad input to the conversion commands ends with exit code 2 and one message, before anything is written."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgopd.models.architecture import read_architecture
from megatron_sgopd.models.weight_map import owned_parameters

from .conftest import Conversion, Finished, run, run_all

Prepare = Callable[[Path], None]
"""Spoils a copy of a good folder."""


def _reconfigure(**changes: object) -> Prepare:
    def prepare(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    return prepare


def _split(folder: Path) -> dict[str, str]:
    """Two shards with an index; returns its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    placed = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return placed


def _missing_shard(folder: Path) -> None:
    _split(folder)
    (folder / "b.safetensors").unlink()


def _lying_index(folder: Path) -> None:
    placed = _split(folder) | {"model.layers.9.mlp.up_proj.weight": "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10 << 30) + path.read_bytes()[8:])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def _loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")


def _more_than_the_disk_holds(folder: Path) -> None:
    """Sparse files that claim more than is free, each tensor one of 8 GiB or less, since they are mapped."""
    layers = 2 + shutil.disk_usage(folder).free // (24 << 30)
    _reconfigure(num_hidden_layers=layers, intermediate_size=1 << 25, layer_types=...)(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for parameter in owned_parameters(read_architecture(folder, with_weights=False)):
        for piece in parameter.pieces:
            name, size = f"{len(weight_map)}.safetensors", 4 * torch.Size(piece.shape).numel()
            header = json.dumps(
                {piece.name: {"dtype": "F32", "shape": piece.shape, "data_offsets": [0, size]}}
            ).encode()
            with (folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.truncate(8 + len(header) + size)
            weight_map[piece.name] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FOLDERS: dict[str, tuple[Prepare, str]] = {
    "missing shard": (_missing_shard, "b.safetensors cannot be read as safetensors"),
    "lying index": (_lying_index, "does not say where these tensors are: model.layers.9.mlp.up_proj.weight"),
    "truncated": (_truncated, "model.safetensors cannot be read as safetensors"),
    "huge header": (_huge_header, "model.safetensors cannot be read as safetensors"),
    "no architectures": (_reconfigure(architectures=...), "architectures = None"),
    "unsupported": (_reconfigure(model_type="gpt2"), "use one of llama, mistral, qwen2, qwen3, qwen3_moe"),
    "pickle": (_pickled, "pickle files are never loaded"),
    "gguf": (_gguf, "tools/gguf_to_hf.py"),
    "symlink loop": (_loop, "model.safetensors is a link in a circle: put the file itself there"),
    "yarn": (_reconfigure(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type = 'yarn'"),
    "unknown field": (_reconfigure(logit_scale=0.5), "logit_scale = 0.5"),
}


@pytest.fixture(scope="module")
def refused(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Finished, Path]]:
    """How the conversion of each spoiled folder ended, and where its output would be."""
    root = tmp_path_factory.mktemp("bad")
    for name, (prepare, _) in FOLDERS.items():
        shutil.copytree(tiny_models["qwen2"], root / name)
        prepare(root / name)
    endings = run_all(
        [["convert", "to-megatron", root / name, root / f"{name} out"] for name in FOLDERS], succeed=False
    )
    return {name: (ending, root / f"{name} out") for name, ending in zip(FOLDERS, endings, strict=True)}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_converted(refused: dict[str, tuple[Finished, Path]], name: str) -> None:
    finished, out = refused[name]
    _check_refused(finished, FOLDERS[name][1])
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()


def _check_refused(finished: Finished, message: str) -> None:
    assert finished.code == 2, finished
    assert message in finished.errors
    assert "Traceback" not in finished.errors
    assert len(finished.errors.strip().splitlines()) == 1


def test_outputs_and_layouts_that_cannot_be(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    qwen2 = tiny_models["qwen2"]
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "note").touch()
    file.touch()
    large = tmp_path / "large"
    shutil.copytree(tiny_models["llama_tied"], large)
    endings = run_all(
        [
            ["convert", "to-megatron", qwen2, tmp_path / "out", "--tensor-parallel", 3],
            ["convert", "to-megatron", qwen2, full],
            ["convert", "to-megatron", qwen2, file],
            ["convert", "to-megatron", tmp_path / "nowhere", tmp_path / "out"],
            ["convert", "to-megatron", qwen2, tmp_path / "out", "--part-size", "5 apples"],
        ],
        succeed=False,
    )
    for ending, message in zip(
        endings[:4],
        ("tensor parallel size 3 does not divide", "not an empty folder", "not an empty folder", "is not a folder"),
        strict=True,
    ):
        _check_refused(ending, message)
    assert endings[4].code == 2
    assert "'5 apples' is no size" in endings[4].errors
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_noticed_before_writing(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models["llama_tied"], tmp_path / "large")
    _more_than_the_disk_holds(tmp_path / "large")
    finished = run("convert", "to-megatron", tmp_path / "large", tmp_path / "out", "--verify", "off")
    _check_refused(finished, "GiB free: free some space")


@pytest.mark.long
def test_a_disk_that_fills_up_ends_with_what_to_do(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    # A limit on the size of files gives the same kind of error as a full disk, without one.
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n"
    )
    there = ["convert", "to-megatron", tiny_models["qwen2"], tmp_path / "out", "--part-size", "100KB"]
    back = ["convert", "to-hf", tmp_path / "out", tmp_path / "back", "--allow-no-tokenizer"]
    for command, target in ((there, "out"), (back, "back")):
        [finished] = run_all([command], prelude=limit, succeed=False)
        _check_refused(finished, "What was finished is kept there")
        assert "File too large" in finished.errors
        assert not (tmp_path / target).exists()
        [finished] = run_all([command])
        assert "proven" in finished.output

    left = tmp_path / "other.partial"
    (tmp_path / "out").rename(left)
    (tmp_path / "other.partial.json").write_text(json.dumps({"direction": "to-megatron", "source": "elsewhere"}))
    finished = run("convert", "to-megatron", tiny_models["qwen2"], tmp_path / "other")
    _check_refused(finished, "is the unfinished work of a conversion with another")


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user may read everything")
def test_a_file_that_may_not_be_read(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models["qwen2"], tmp_path / "model")
    (tmp_path / "model/model.safetensors").chmod(0)
    _check_refused(run("convert", "to-megatron", tmp_path / "model", tmp_path / "out"), "cannot be read")


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/hostile-metadata-was-run",)


def test_checkpoints_that_cannot_be_converted(conversions: dict[str, Conversion], tmp_path: Path) -> None:
    model = conversions["qwen2"]
    for name in ("torn", "unfinished", "hostile"):
        shutil.copytree(model.megatron, tmp_path / name)
    [part] = (tmp_path / "torn/release").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-500])
    (tmp_path / "unfinished/release/.metadata").unlink()
    (tmp_path / "hostile/release/.metadata").write_bytes(pickle.dumps(_Hostile()))
    messages = {
        "torn": "the checkpoint is not complete",
        "unfinished": "is no complete checkpoint",
        "hostile": "names posix.mkdir, which has no place there",
        "nowhere": "is no torch_dist checkpoint",
    }
    arguments = ["--allow-no-tokenizer", "--like", model.source]
    commands: list[list[object]] = [["convert", "to-hf", tmp_path / n, tmp_path / "out", *arguments] for n in messages]
    commands += [
        ["convert", "to-hf", model.megatron, tmp_path / "out", "--step", 7, *arguments],
        ["convert", "to-hf", model.megatron, tmp_path / "out"],
        ["export", model.megatron, tmp_path / "out"],
        ["inspect", tmp_path],
    ]
    expected = [
        *messages.values(),
        "iter_0000007 is no complete",
        "--allow-no-tokenizer",
        "not a run folder",
        "is no torch",
    ]
    for ending, message in zip(run_all(commands, succeed=False), expected, strict=True):
        _check_refused(ending, message)
    assert not (tmp_path / "out").exists()
    assert not Path("/tmp/hostile-metadata-was-run").exists()
