"""Filling a bank: a fixed model's responses to problems, generated, verified and written part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_sgopd.checkpoint.files import model_digest
from megatron_sgopd.config import RolloutSettings, VerifySettings
from megatron_sgopd.monitor.output import libraries_write_to
from megatron_sgopd.platform import select
from megatron_sgopd.processes import joined_ranks, launched_ranks
from megatron_sgopd.rollout.bank import BankIdentity, BankWriter, RolloutBank, StoredRollout, writing
from megatron_sgopd.rollout.engine import RolloutEngine, replicas
from megatron_sgopd.rollout.prompts import Prompt, PromptSet
from megatron_sgopd.rollout.trajectory import Decoding, Trajectory, from_first_rank
from megatron_sgopd.verify.base import VerifierResult
from megatron_sgopd.verify.stage import Verification

_PART_ROLLOUTS = 2048
"""About how many are made before they are written; a worker that is killed loses no more than twice that."""
_PART_TOKENS = 1 << 24
"""Most tokens that those can have: while they are made, each takes 40 bytes of the host's memory."""


@dataclass(frozen=True)
class Sampling:
    """How a model answers problems: the same responses whoever asks, whenever, and with whatever other problems."""

    samples: int
    """Responses to each problem."""
    decoding: Decoding
    seed: int
    step: int
    """Stands for a training step in the seeds; negative, one for each use."""


@dataclass(frozen=True)
class Worker:
    """A model that answers, and who judges it."""

    model: str
    """Hugging Face folder."""
    tokenizer: Any
    sampling: Sampling
    rollout: RolloutSettings
    """Of an engine that has its devices to itself."""
    verify: VerifySettings
    context_tokens: int
    """That a prompt and its response must fit."""
    platform: Any = "auto"
    tensor_parallel_setting: str = "rollout.tensor_parallel"
    """Where `rollout.tensor_parallel` comes from."""

    def check_ranks(self) -> None:
        """Check that the ranks that were started together form whole replicas of the engine.

        Raises:
            ConfigError: they do not.
        """
        replicas(launched_ranks(), self.rollout.tensor_parallel, self.tensor_parallel_setting)

    def identity(self, prompts: PromptSet) -> BankIdentity:
        """What the rollouts of this worker have in common."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return BankIdentity(
            model=model_digest(Path(self.model)),
            tokenizer=hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest(),
            prompts=prompts.digest,
            samples=self.sampling.samples,
            temperature=self.sampling.decoding.temperature,
            top_p=self.sampling.decoding.top_p,
            top_k=self.sampling.decoding.top_k,
            stop=json.dumps(self.sampling.decoding.stop),
            max_new_tokens=self.rollout.max_new_tokens,
            seed=self.sampling.seed,
            verifier=self.verify.verifier,
        )


@dataclass(frozen=True)
class Work:
    """Problems to answer, and the bank that they are to be in."""

    folder: Path
    identity: BankIdentity
    prompts: Sequence[Prompt]


def fill(works: Sequence[Work], name: str, worker: Worker, log: Path) -> None:
    """Answer what the banks lack, as their writer `name`.

    The ranks that torchrun or srun started work together.

    Args:
        log: receives what libraries print.

    Raises:
        ConfigError: a bank is another one, another process does the same, or the ranks form no whole replicas.
    """
    worker.check_ranks()
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(libraries_write_to(log))
        select(worker.platform)
        rank = stack.enter_context(joined_ranks())
        say = console.print if rank == 0 else _nothing
        answering: Answering | None = None
        for work in works:
            writer = stack.enter_context(writing(work.folder, work.identity, name)) if rank == 0 else None
            bank = RolloutBank(work.folder)
            missing = absent_problems(bank, work.prompts)
            if len(missing) < len(work.prompts):
                say(f"{len(work.prompts) - len(missing)} of {len(work.prompts)} problems are there already")
            if missing:
                answering = answering or stack.enter_context(Answering(worker))
                for progress in answering.progress(missing, writer):
                    say(progress)
            bank.refresh()
            say(f"{work.folder} has {bank.rollouts} rollouts of {len(bank)} problems; {bank.approved} were approved")


def _nothing(_: Any) -> None:
    """For ranks whose words would repeat the first one's."""


class Answering(contextlib.AbstractContextManager["Answering"]):
    """A worker with its engine and its verifier processes."""

    def __init__(self, worker: Worker) -> None:
        self._sampling, self._max_new_tokens = worker.sampling, worker.rollout.max_new_tokens
        self._verification = Verification(worker.verify, worker.tokenizer)
        self.engine = RolloutEngine(worker.model, worker.rollout, worker.context_tokens, worker.sampling.seed)

    def __exit__(self, *exception: object) -> None:
        self._verification.close()
        self.engine.close()

    def progress(self, prompts: Sequence[Prompt], writer: BankWriter | None) -> Iterator[str]:
        """Generate, verify and write, and say so; a part is verified while the next one is generated."""
        samples = self._sampling.samples
        together = max(1, min(_PART_ROLLOUTS, _PART_TOKENS // self._max_new_tokens) // samples)
        total, started, done, approved = len(prompts) * samples, time.monotonic(), 0, 0
        judging: tuple[Sequence[Trajectory], Callable[[], torch.Tensor]] | None = None
        for part in [*itertools.batched(prompts, together), ()]:
            trajectories = sample_problems(self.engine, part, self._sampling) if part else []
            if judging is not None:
                judged, outcomes = judging
                approved += int(outcomes().sum())
                done += len(judged)
                texts, results = self._verification.all_texts(), self._verification.all_results()
                if writer is not None:
                    writer.write(judged_rollouts(judged, texts, results))
                rate = done / (time.monotonic() - started)
                yield (
                    f"{done} of {total} rollouts, {approved / done:.0%} approved, {rate:.0f} a second, "
                    f"left {timedelta(seconds=round((total - done) / rate))}"
                )
            judging = (trajectories, self._verification.start(trajectories))


def sample_problems(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Trajectory]:
    """Responses to problems, whatever epoch their prompts are of."""
    problems = [dataclasses.replace(prompt, id=prompt.problem) for prompt in prompts]
    samples = [sampling.samples] * len(problems)
    return engine.generate(problems, samples, sampling.decoding, sampling.seed, sampling.step)


def judged_rollouts(
    trajectories: Sequence[Trajectory], texts: Sequence[str], results: Sequence[VerifierResult]
) -> list[StoredRollout]:
    """As they are kept in a bank."""
    return [
        StoredRollout(
            t.prompt.problem,
            t.sample,
            array("i", t.token_ids),
            text,
            t.truncated,
            r.outcome,
            r.extracted,
            r.reason,
            r.vote,
        )
        for t, text, r in zip(trajectories, texts, results, strict=True)
    ]


def absent_problems(bank: RolloutBank, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those of `prompts` that the bank has no rollouts of, by what the first rank sees of it."""
    absent = from_first_rank(torch.tensor([prompt.problem not in bank for prompt in prompts], dtype=torch.bool))
    return [prompt for prompt, is_absent in zip(prompts, absent.tolist(), strict=True) if is_absent]
