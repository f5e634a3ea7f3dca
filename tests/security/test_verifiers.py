"""Answers, recordings and verifiers of others."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import Prompt, PromptSet
from megatron_sgopd.rollout.recording import Recording
from megatron_sgopd.verify.base import VerifierResult, VerifyRequest
from megatron_sgopd.verify.pool import VerifierPool

from ..commands import REPOSITORY
from ..recordings import recorded_step

OWN = Prompt("problem 0", "1 + 1 =", (1, 2), "2", "bitwise_arithmetic", {"problem": "1 + 1"})


def record(folder: Path, of: Prompt = OWN, **changes: Any) -> Path:
    """A recorded step with one response."""
    return recorded_step(folder, of, **changes)


def replay(folder: Path, known: PromptSet | None = None, step: int = 0) -> Any:
    return Recording(str(folder), None, 10, known, {}).load(step)


def test_a_recording_of_the_runs_own_prompts_is_replayed_over_and_over(tmp_path: Path) -> None:
    known = PromptSet.of([OWN])
    for step in (0, 1, 7):
        batch, _ = replay(record(tmp_path), known, step)
        assert batch.step == step and batch.trajectories[0].token_ids == (3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {"problem": "__import__('os').system('touch /tmp/owned')"}},
        {"task": "number_sorting", "answer": "__import__('os')"},
        {"text": "2 + 2 ="},
        {"id": "problem 1"},
    ],
)
def test_what_a_recording_says_of_a_prompt_reaches_no_scorer(changes: dict[str, Any], tmp_path: Path) -> None:
    """Scorers of reasoning-gym evaluate what the task's own metadata says."""
    planted = dataclasses.replace(OWN, **changes)
    with pytest.raises(ConfigError, match=r"step_000000\.json: problem . is not that of data\.train"):
        replay(record(tmp_path, planted), PromptSet.of([OWN]))
    replay(record(tmp_path, planted))  # where the verifier believes nothing of it


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [3, 10]},
        {"token_ids": [-1, 3]},
        {"prompt": 1},
        {"prompt": -1},
        {"behaviour": [-1.0]},
        {"from_teacher": True},
        {"token_ids": "34"},
        {"sample": None},
    ],
)
def test_a_recording_that_would_break_a_rank_later_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step_000000\.json is no"):
        replay(record(tmp_path, **changes))


def test_numbers_of_another_batch_are_refused(tmp_path: Path) -> None:
    record(tmp_path)
    save_file({"teacher_logprobs_T": torch.zeros(3)}, tmp_path / "step_000000.safetensors")
    with pytest.raises(ConfigError, match=r"teacher_logprobs_T has the shape \(3,\)"):
        replay(tmp_path)
    (tmp_path / "step_000000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"step_000000\.safetensors cannot be read"):
        replay(tmp_path)


def test_a_step_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "step_000002.json").write_bytes((tmp_path / "step_000000.json").read_bytes())
    with pytest.raises(ConfigError, match=r"step_000001\.json is missing before step_000002\.json"):
        replay(tmp_path, step=1)


# ---- Verifiers of one's own -----------------------------------------------------------------------------


def gives_a_number(request: VerifyRequest) -> VerifierResult:
    extracted: Any = 42
    return VerifierResult(1, extracted, "right")


def gives_an_array(request: VerifyRequest) -> VerifierResult:
    import numpy as np

    outcome: Any = np.array([1, 0])
    return VerifierResult(outcome, "42", "right")


def gives_no_reason(request: VerifyRequest) -> VerifierResult:
    reason: Any = None
    return VerifierResult(1, "42", reason)


def is_slow(request: VerifyRequest) -> VerifierResult:
    time.sleep(60)
    return VerifierResult(1, "42", "right")


@pytest.mark.parametrize("verifier", [gives_a_number, gives_an_array, gives_no_reason])
def test_a_verifier_that_returns_something_else_is_named(verifier: Callable[..., Any]) -> None:
    request = VerifyRequest("1+1", "2", "2", "", {})
    with (
        VerifierPool(f"tests.security.test_verifiers:{verifier.__name__}") as pool,
        pytest.raises(RuntimeError, match=r"returned .*, not a VerifierResult with outcome 0 or 1, the answer as text"),
    ):
        pool.submit([request]).result()


SETTLES = """
import itertools, json, time
from megatron_sgopd.config import VerifySettings
from megatron_sgopd.platform import select
from megatron_sgopd.processes import joined_ranks
from megatron_sgopd.rollout.trajectory import Trajectory
from megatron_sgopd.verify import stage
from tests.security.test_verifiers import OWN

class Decodes:
    def batch_decode(self, token_ids, skip_special_tokens):
        return ["42" for _ in token_ids]

stage._ROUND = 0.2
settings = VerifySettings(verifier="tests.security.test_verifiers:is_slow", time_limit=0.5)
signs = []
select("cpu")
with joined_ranks():
    earlier = {"verifier_timeout": 3.0}
    verification = stage.Verification(settings, Decodes(), earlier, alive=lambda: signs.append(time.monotonic()))
    trajectories = [Trajectory(OWN, sample, (1,), (0.0,), truncated=False) for sample in range(6)]
    outcomes = verification.start(trajectories)().tolist()
    reasons = [result.reason for result in verification.all_results()]
    verification.close()
gaps = [later - sooner for sooner, later in itertools.pairwise(signs)]
print(json.dumps([outcomes, reasons, verification.faults["verifier_timeout"], gaps]))
"""


@pytest.mark.long
def test_a_step_lives_as_long_as_slow_answers_settle() -> None:
    """And so does whoever waits for another rank's."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    words = [sys.executable, "-c", SETTLES]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=REPOSITORY, env=alone)
    outcomes, reasons, timeouts, gaps = json.loads(done.stdout.splitlines()[-1])
    assert outcomes == [0.0] * 6 and reasons == ["timeout"] * 6
    assert timeouts == 9, "with those of the attempts before"
    assert len(gaps) >= 4 and max(gaps) < sum(gaps) / 2, "a sign for each answer or so, and none while nothing settles"
