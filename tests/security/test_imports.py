"""A module that lies in the folder in which a user happens to be is not imported by what is started there."""

from pathlib import Path

import pytest

from megatron_sgopd.cli import _launch
from megatron_sgopd.cluster import doctor

PLANT = "from pathlib import Path\nPath(__file__).with_suffix('.executed').touch()\nraise ImportError('planted')\n"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that torch, typing and others import first."""
    for name in ("uuid", "random", "yaml", "megatron"):
        (tmp_path / f"{name}.py").write_text(PLANT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.executed"))


def test_ranks(planted: Path) -> None:
    assert _launch([], 1, planted / "run") == 1  # they end when they read their flags
    assert "setting 'model' is missing" in (planted / "run/logs/launcher.log").read_text()
    assert executed(planted) == []


def test_what_the_doctor_starts(planted: Path) -> None:
    assert [finding.level for finding in doctor.collectives()] == ["green"]
    assert executed(planted) == []
