"""Text of others reaches a terminal as text."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sgopd import cli
from megatron_sgopd.cli import main
from megatron_sgopd.common.console import Terminal, printable, styled
from megatron_sgopd.monitor import metrics
from megatron_sgopd.monitor.metrics import Monitor

from ..unit.test_report import write_run
from .conftest import RECIPE, change_json

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"


def unharmed(text: str) -> bool:
    return not any(character in text for character in "\x1b\x07\x9b\r\u202e")


@pytest.mark.parametrize(
    "text",
    ["\x00", "\x1b[2J", "\x9b2J", "\x7f", "\r", "\u202ea", "\u2066", "\u200b", "\ufeff", "\ud800", "\U000e0041"],
)
def test_what_acts_on_a_terminal_is_spelt_out(text: str) -> None:
    assert printable(text).startswith("\\") and printable(text).isascii()


def test_what_is_text_stays() -> None:
    assert printable("né 汉字 🤗 a\tb\n") == "né 汉字 🤗 a\tb\n"


def test_a_terminal_prints_neither_escapes_nor_markup_nor_emoji_codes() -> None:
    out = io.StringIO()
    Terminal(out).print(ESCAPES, "[/bold][red]", ":smile:", styled(ESCAPES, "bold"))
    assert unharmed(out.getvalue()) and "[/bold][red] :smile:" in out.getvalue()


def test_an_error_that_tells_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "1", f"answer{ESCAPES}[/bold]": ESCAPES}) + "\n")
    words = ["train", str(RECIPE), "--set", f"run_dir={tmp_path / 'run'}", "--set", f"data.train.source={path}"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert unharmed(said) and "[/bold]" in said and "\\x1b]0;owned" in said


def test_tensor_names_that_inspect_and_diff_show(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({f"model.{ESCAPES}[/bold]": torch.zeros(1)}, model / "model.safetensors")
    assert main(["inspect", str(model)]) == 2
    change_json(model / "config.json", model_type=ESCAPES)
    assert main(["inspect", str(model)]) == 2
    assert unharmed(capsys.readouterr().err)


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """A run folder whose every text wants more than to be read."""
    run = write_run(tmp_path / f"[/bold]{ESCAPES}", 3)
    (run / "logs").mkdir()
    (run / "logs/rank-0.error").write_text(f"{ESCAPES}[/red]")
    begin = {"event": "begin", "time": ESCAPES, "step": 0, "job": ESCAPES, "host": ESCAPES}
    end = {"event": "end", "time": ESCAPES, "step": 3, "outcome": ESCAPES, "reason": f"[/bold]{ESCAPES}"}
    (run / "attempts.jsonl").write_text(f"{json.dumps(begin)}\n{json.dumps(end)}\n")
    return run


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["report"]])
def test_a_run_folder_of_somebody_else(
    command: list[str], hostile_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(hostile_run)]) == 0
    said = capsys.readouterr()
    assert unharmed(said.out + said.err) and said.out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attempts.jsonl", "{}\n"),
        ("attempts.jsonl", '{"event": "end"}\n'),
        ("attempts.jsonl", '{"event": "begin", "time": 1, "step": "x", "job": [], "host": {}}\n'),
        ("metrics.jsonl", '{"step": "x", "seconds": null}\n'),
        ("metrics.jsonl", '["step"]\n'),
        ("metrics.jsonl", '{"step": 1, "seconds": 1e308}\n'),
        ("metrics.jsonl", '{"step": 1e999, "seconds": 1}\n'),
        ("evaluations.jsonl", '{"name": "after"}\n'),
        ("evaluations.jsonl", '{"name": "after", "step": 1, "pass_rate": "x"}\n'),
        ("recipe.yaml", "[]"),
        ("recipe.yaml", "train: {steps: soon}"),
        ("recipe.yaml", "a: &a [*a]"),
        ("heartbeats/rank-0", '{"rank": "x"}'),
    ],
)
def test_a_run_folder_that_is_not_as_a_run_writes_it(
    name: str, text: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = write_run(tmp_path / "run", 3)
    (run / "heartbeats").mkdir()
    (run / name).write_text(text)
    said = refused("status", run)
    assert name.partition("/")[0] in said


@pytest.mark.parametrize("numbers", ['"loss": [1]', '"stage_seconds": [1]', f'"loss": {"9" * 400}', '"loss": {"a": 1}'])
def test_numbers_that_are_none_are_left_out(numbers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 3)
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "seconds": 1.0, "pass_rate": 0.5, {numbers}}}\n')
    (run / "logs/rank-0.error").mkdir(parents=True)
    assert main(["status", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_that_nobody_foresaw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: Any) -> None:
        raise RuntimeError(ESCAPES)

    monkeypatch.setattr(cli, "_train", fails)
    assert main(["train", "recipe.yaml"]) == 1
    said = capsys.readouterr().err
    assert unharmed(said) and "Traceback" in said


def test_a_rank_shows_responses_and_answers_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(metrics, "console", lambda: Terminal(out))
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 0)

    class Settings:
        run_dir = str(tmp_path)

        class logging:
            samples_mib = 1

    settings: Any = Settings()
    monitor = Monitor(settings, 0, 10)
    line = {"step": 1, "response": ESCAPES, "answer": f"[/bold]{ESCAPES}", "outcome": 0, "reason": f"[/red]{ESCAPES}"}
    monitor.samples([line, line | {"outcome": 1}])
    monitor.note(f"[/bold]{ESCAPES}")
    assert unharmed(out.getvalue()) and out.getvalue().count("[/bold]") == 3
