"""Which checkpoints of a run are whole, and which one it goes on from."""

from pathlib import Path

import pytest

from megatron_sgopd.checkpoint.completeness import (
    MANIFEST,
    TRACKER,
    begin_change,
    check_complete,
    choose_newest,
    end_change,
    expired,
    newest_step,
    record,
    remove_checkpoint,
    write_manifest,
)
from megatron_sgopd.errors import ConfigError

FILES = (".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp")


def saved(checkpoints: Path, step: int, with_digests: bool = False) -> Path:
    folder = checkpoints / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(f"{step} {name}".encode() * 50)
    write_manifest(folder, {name: record(folder / name, with_digests) for name in FILES})
    (checkpoints / TRACKER).write_text(str(step))
    return folder


def test_a_whole_checkpoint_is_taken_at_its_word(tmp_path: Path) -> None:
    for with_digests in (False, True):
        check_complete(saved(tmp_path / str(with_digests), 10, with_digests), with_digests=True)


@pytest.mark.parametrize("name", FILES)
def test_each_missing_or_shortened_file_is_named(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 10)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=rf"{name} has \d+ bytes, and was written with {len(content)}"):
        check_complete(folder, with_digests=False)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        check_complete(folder, with_digests=False)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_caught_where_digests_were_asked_for_and_always_in_what_is_unpickled(
    name: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, 10, with_digests=True)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} has another digest"):
        check_complete(folder, with_digests=True)
    if not name.endswith(".distcp"):
        with pytest.raises(ConfigError, match=f"{name} has another digest"):
            check_complete(folder, with_digests=False)


def test_the_newest_whole_one_is_chosen_and_the_others_are_put_out_of_the_way(tmp_path: Path) -> None:
    folders = {step: saved(tmp_path, step) for step in (10, 20, 30, 40)}
    begin_change(folders[40])
    (folders[40] / MANIFEST).unlink()
    (folders[30] / "__1_0.distcp").unlink()
    with pytest.raises(ConfigError, match=f"has no {MANIFEST}"):
        check_complete(folders[40], with_digests=False)
    (tmp_path / TRACKER).write_text("")  # cut off in the middle of its writing
    assert newest_step(tmp_path) == 30
    chosen, skipped = choose_newest(tmp_path, with_digests=False)
    assert chosen == 20 and (tmp_path / TRACKER).read_text() == "20"
    assert skipped == [
        "iter_0000040 has no manifest.json: whoever saved or removed it was interrupted; removed",
        "iter_0000030/__1_0.distcp is missing; kept as iter_0000030.broken",
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "iter_0000010",
        "iter_0000020",
        "iter_0000030.broken",
    ]
    assert choose_newest(tmp_path, with_digests=False) == (20, [])


def test_a_run_interrupted_in_its_first_save_begins_anew_and_one_whose_checkpoints_broke_does_not(
    tmp_path: Path,
) -> None:
    first = saved(tmp_path / "first", 10)
    begin_change(first)
    (first / MANIFEST).unlink()
    chosen, skipped = choose_newest(tmp_path / "first", with_digests=False)
    assert chosen == 0 and len(skipped) == 1 and not (tmp_path / "first" / TRACKER).exists()
    assert choose_newest(tmp_path / "none", with_digests=False) == (0, [])
    broken = saved(tmp_path / "broken", 10)
    (broken / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole \(iter_0000010/.metadata is missing"):
        choose_newest(tmp_path / "broken", with_digests=False)
    with pytest.raises(ConfigError, match="they were broken before"):
        choose_newest(tmp_path / "broken", with_digests=False)


def test_what_may_go() -> None:
    steps = [50, 40, 30, 20, 10]
    assert expired(steps, None, 20) == []
    assert expired(steps, 2, None) == [30, 20, 10]
    assert expired(steps, 2, 20) == [30, 10]
    assert expired(steps, 9, None) == []


def test_a_checkpoint_of_somebody_else_is_kept(tmp_path: Path) -> None:
    foreign = saved(tmp_path, 10)
    (foreign / MANIFEST).unlink()
    with pytest.raises(
        ConfigError, match=r"is whole \(iter_0000010 has no manifest.json; kept as iter_0000010.broken\)"
    ):
        choose_newest(tmp_path, with_digests=False)
    assert (tmp_path / "iter_0000010.broken/.metadata").is_file()


def test_a_manifest_that_cannot_be_read_costs_its_checkpoint_alone(tmp_path: Path) -> None:
    for content in ("", "{", "[]", '{"files": {"a": {"bytes": 1}}}', '{"files": {"a": 3}}'):
        saved(tmp_path, 10)
        (saved(tmp_path, 20) / MANIFEST).write_text(content)
        chosen, [said] = choose_newest(tmp_path, with_digests=False)
        assert chosen == 10 and f"iter_0000020/{MANIFEST} cannot be read" in said
        remove_checkpoint(tmp_path / "iter_0000010")


def test_a_removal_that_was_interrupted_is_ended_later(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        saved(tmp_path, step)
    begin_change(tmp_path / "iter_0000010")
    (tmp_path / "iter_0000010" / MANIFEST).unlink()
    begin_change(tmp_path / "iter_0000020")  # and no further: it is whole
    chosen, [said] = choose_newest(tmp_path, with_digests=False)
    assert chosen == 30 and said.startswith("iter_0000010 has no manifest.json")
    remove_checkpoint(tmp_path / "iter_0000020")
    end_change(tmp_path / "iter_0000020")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000030", TRACKER]
