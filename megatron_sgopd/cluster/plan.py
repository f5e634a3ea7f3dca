"""What a layout of a run needs on each rank and how long its steps take, and the layouts that are best.

Nothing is built: all follows from two config.json, a recipe and a device's data sheet.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_sgopd.cluster import memory, times
from megatron_sgopd.cluster.hardware import GIB, Device, allowance
from megatron_sgopd.cluster.times import Calibration, Spread, Workload
from megatron_sgopd.config import ALONE_MEMORY_FRACTION, Recipe
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.fp8 import check_fp8_layout
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.models.logprobs import default_chunk_tokens
from megatron_sgopd.models.provider import padded_vocab_size
from megatron_sgopd.models.weight_map import ParallelLayout, parameter_count, split_alike
from megatron_sgopd.objective.methods import Method
from megatron_sgopd.rollout.packing import segment_multiple
from megatron_sgopd.rollout.teacher_rollouts import teacher_engine

_SIZES = (1, 2, 4, 8, 16)
_MENDS = {
    "generate": "raise rollout.tensor_parallel, or set teacher.offload",
    "sync": "raise parallel.tensor or parallel.pipeline, or lower rollout.sync_bucket_mib",
    "teacher": "raise teacher.tensor_parallel or teacher.pipeline_parallel, or set teacher.offload",
    "reference": "raise parallel.tensor, set teacher.offload, or take a method with sgopd.reference live",
    "train": "raise parallel.tensor, parallel.pipeline or parallel.context, lower train.rows_per_microbatch or "
    "train.row_tokens, set teacher.offload, megatron.use-distributed-optimizer, or "
    "megatron.recompute-granularity=full with megatron.recompute-method=uniform and megatron.recompute-num-layers=1",
    "host": "raise teacher.tensor_parallel or teacher.pipeline_parallel, leave teacher.offload out, or leave "
    "megatron.dist-ckpt-optim-fully-reshardable out, by which a save gathers the optimizer's state on every rank",
}


@dataclass(frozen=True)
class Setup:
    """The choices that a planner makes."""

    ranks: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    rows_per_microbatch: int
    recompute: bool
    """Every layer is computed again in the backward pass."""
    sequence: bool
    distributed_optimizer: bool
    reshardable: bool
    """Checkpoints of the distributed optimizer can be loaded in any layout."""
    teacher_tensor: int
    teacher_pipeline: int
    teacher_expert: int
    offload: bool
    rollout_tensor: int
    memory_fraction: float | None
    """The engine's share of the memory; None: as much as is left."""

    @functools.cached_property
    def student(self) -> Spread:
        layout = ParallelLayout(self.tensor, self.pipeline, expert=self.expert)
        data = self.ranks // (self.tensor * self.pipeline * self.context)
        return Spread(layout, data, self.sequence, self.context)

    @functools.cached_property
    def teacher(self) -> Spread:
        layout = ParallelLayout(self.teacher_tensor, self.teacher_pipeline, expert=self.teacher_expert)
        data = self.ranks // (self.teacher_tensor * self.teacher_pipeline * self.context)
        return Spread(layout, data, context=self.context)

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share the state of the optimizer."""
        return self.student.data * self.context if self.distributed_optimizer else 1

    @functools.cached_property
    def shares(self) -> int:
        """Packed rows are split into as many."""
        return math.lcm(self.student.data, self.teacher.data)

    def settings(self) -> dict[str, object]:
        """As they stand in a recipe."""
        recompute = {"granularity": "full", "method": "uniform", "num-layers": 1} if self.recompute else {}
        return {
            "parallel.ranks": self.ranks,
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.context": self.context,
            "parallel.expert": self.expert,
            "parallel.sequence": self.sequence,
            "train.rows_per_microbatch": self.rows_per_microbatch,
            "teacher.tensor_parallel": self.teacher_tensor,
            "teacher.pipeline_parallel": self.teacher_pipeline,
            "teacher.expert_parallel": self.teacher_expert,
            "teacher.offload": self.offload,
            "rollout.tensor_parallel": self.rollout_tensor,
            **({} if self.memory_fraction is None else {"rollout.memory_fraction": self.memory_fraction}),
            "megatron.use-distributed-optimizer": self.distributed_optimizer,
            **{f"megatron.recompute-{name}": value for name, value in recompute.items()},
        }


@dataclass(frozen=True)
class Plan:
    """What came of a setup. Bytes are of the fullest rank."""

    setup: Setup
    phases: dict[str, dict[str, int]]
    """Phase -> what lies in the device's memory meanwhile."""
    seconds: dict[str, float]
    """Stage -> its part of a step."""
    problems: dict[str, str]
    """Phase -> why it does not fit, and the mend; empty if all do."""
    missing: dict[str, int]
    """Phase -> bytes too many."""
    tokens: float
    """Of the responses of a step."""

    @property
    def worst_problem(self) -> str:
        """Of the phase that lacks most."""
        return self.problems[max(self.missing, key=lambda phase: self.missing[phase])]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


def setup_of(recipe: Recipe, ranks: int | None = None) -> Setup:
    """The choices that a recipe makes, on `ranks` ranks in place of its own."""
    flags = {name.removeprefix("--").replace("_", "-"): value for name, value in recipe.megatron.items()}
    parallel, teacher = recipe.parallel, recipe.teacher
    return Setup(
        ranks or parallel.ranks,
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.expert,
        recipe.train.rows_per_microbatch,
        flags.get("recompute-granularity") == "full",
        parallel.sequence and parallel.tensor > 1,
        bool(flags.get("use-distributed-optimizer")),
        bool(flags.get("dist-ckpt-optim-fully-reshardable")),
        teacher.tensor_parallel or parallel.tensor,
        teacher.pipeline_parallel or parallel.pipeline,
        teacher.expert_parallel,
        teacher.offload,
        recipe.rollout.tensor_parallel,
        recipe.rollout.memory_fraction,
    )


def check_divides(setup: Setup, student: Architecture, teacher: Architecture | None, responses: int) -> None:
    """Models, ranks and the responses of a step divide as a setup asks.

    Raises:
        ConfigError: naming the first that does not.
    """
    student.check_parallel(setup.tensor, setup.pipeline, setup.expert)
    student.check_parallel(setup.rollout_tensor, 1)
    if teacher is not None:
        teacher.check_parallel(setup.teacher_tensor, setup.teacher_pipeline, setup.teacher_expert)
    for name, size in (
        ("parallel.tensor x parallel.pipeline x parallel.context", setup.tensor * setup.pipeline * setup.context),
        ("parallel.tensor x parallel.pipeline x parallel.expert", setup.tensor * setup.pipeline * setup.expert),
        (
            "teacher.tensor_parallel x teacher.pipeline_parallel x parallel.context",
            setup.teacher_tensor * setup.teacher_pipeline * setup.context,
        ),
        (
            "teacher.tensor_parallel x teacher.pipeline_parallel x teacher.expert_parallel",
            setup.teacher_tensor * setup.teacher_pipeline * setup.teacher_expert,
        ),
        ("rollout.tensor_parallel", setup.rollout_tensor),
    ):
        if setup.ranks % size:
            raise ConfigError(f"{name} = {size} does not divide parallel.ranks={setup.ranks}")
    if student.num_experts and setup.tensor > 1 and not setup.sequence:
        raise ConfigError(
            f"model.path has experts, and Megatron trains them with parallel.tensor={setup.tensor} only under sequence "
            "parallelism: set parallel.sequence, or let parallel.tensor be 1 and raise parallel.expert"
        )
    if responses % (setup.student.data * setup.rows_per_microbatch):
        raise ConfigError(
            f"rollout.prompts_per_step x rollout.group_size = {responses} responses is not divisible by "
            f"{setup.student.data} data-parallel ranks x train.rows_per_microbatch={setup.rows_per_microbatch}: "
            "change one of them"
        )


def check_context(context: int, row_tokens: int, method: Method) -> None:
    """Rows can be split over so many context-parallel ranks, and a method over what each of them has of a response.

    Raises:
        ConfigError: naming the setting that does not fit.
    """
    multiple = segment_multiple(context)
    if row_tokens % multiple:
        raise ConfigError(
            f"parallel.context={context} splits rows into {multiple} chunks, but train.row_tokens={row_tokens} is no "
            f"multiple of that: let it be {math.ceil(row_tokens / multiple) * multiple}"
        )
    if context > 1 and method.needs_whole_responses:
        raise ConfigError(
            f"parallel.context={context} splits each response over ranks, but sgopd.method={method.name} needs all of "
            "a response's tokens for each of them: leave parallel.context out, or take another method"
        )


def check_full_estimator(
    student: Architecture,
    teacher: Architecture,
    student_layout: ParallelLayout,
    teacher_layout: ParallelLayout,
    offload: bool,
) -> None:
    """Both models' output layers are split alike and on the device, so that logits can be compared where they are.

    Raises:
        ConfigError: naming the setting that does not fit.
    """
    (tensor, pipeline), theirs = ((layout.tensor, layout.pipeline) for layout in (student_layout, teacher_layout))
    if theirs != (tensor, pipeline) or offload:
        raise ConfigError(
            f"sgopd.estimator=full needs the teacher's output layer beside the student's, but the teacher is laid out "
            f"{theirs[0]} x {theirs[1]}, the student {tensor} x {pipeline}, and teacher.offload is {offload}: leave "
            "out the settings of the teacher's layout, or take estimator sampled"
        )
    rows = [padded_vocab_size(architecture, tensor) for architecture in (student, teacher)]
    if rows[0] != rows[1] or student.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"sgopd.estimator=full needs a teacher's logit for each of the student's, but the student has "
            f"{student.vocab_size} tokens in {rows[0]} rows and the teacher {teacher.vocab_size} in {rows[1]}: take "
            "estimator sampled"
        )


def teacher_engine_bytes(recipe: Recipe, teacher: Architecture, device: Device) -> dict[str, int]:
    """What lies in a GPU's memory while the teacher makes rollouts ahead of training, where nothing else is.

    Raises:
        ConfigError: its weights leave no room for a whole row's keys and values, or its heads do not divide.
    """
    settings, rollouts = teacher_engine(recipe), recipe.teacher_rollouts
    teacher.check_parallel(settings.tensor_parallel, 1)
    share = int(rollouts.memory_fraction * device.memory)

    def fixed(tensor: int) -> int:
        return parameter_count(teacher) * 2 // tensor + round(allowance("engine_awake_gib") * GIB)

    def row(tensor: int) -> int:
        return memory.cache_bytes_per_token(teacher) * recipe.train.row_tokens // tensor

    tensor = settings.tensor_parallel
    if fixed(tensor) + row(tensor) > share:
        enough = [size for size in _SIZES if teacher.num_query_groups % size == 0 and fixed(size) + row(size) <= share]
        mend = f"let teacher_rollouts.tensor_parallel be {enough[0]}" if enough else "take GPUs with more memory"
        raise ConfigError(
            f"the teacher's engine needs {_gib(fixed(tensor) + row(tensor))} on a GPU with "
            f"teacher_rollouts.tensor_parallel={tensor}, and teacher_rollouts.memory_fraction="
            f"{rollouts.memory_fraction:g} of {_gib(device.memory)} is {_gib(share)}: {mend}"
        )
    return {"engine": fixed(tensor), "cache": share - fixed(tensor)}


def planner_of(
    recipe: Recipe,
    method: Method,
    device: Device,
    lengths: tuple[float | None, float | None] = (None, None),
    calibration: Calibration | None = None,
) -> Planner:
    """The planner of a recipe, whose models need no weights.

    Args:
        lengths: mean tokens of prompts and of responses, where they are known.

    Raises:
        ConfigError: a model's config.json is missing or not understood.
    """
    rollout, row_tokens = recipe.rollout, recipe.train.row_tokens
    prompt_tokens, response_tokens = lengths
    work = Workload(
        rollout.prompts_per_step,
        rollout.group_size,
        prompt_tokens or row_tokens / 8,
        response_tokens or rollout.max_new_tokens / 2,
        rollout.max_new_tokens,
        row_tokens,
    )
    student = read_architecture(recipe.model.path, with_weights=False)
    teacher = read_architecture(recipe.teacher.path, with_weights=False) if method.teacher else None
    return Planner(recipe, student, teacher, method, device, work, calibration)


class Planner:
    """Judges setups of one recipe on one kind of device."""

    def __init__(
        self,
        recipe: Recipe,
        student: Architecture,
        teacher: Architecture | None,
        method: Method,
        device: Device,
        work: Workload,
        calibration: Calibration | None = None,
    ) -> None:
        """What stays the same whatever the setup.

        Args:
            teacher: None where the method has none.
        """
        self._recipe = recipe
        self._student = student
        self._teacher = teacher
        self._method = method
        self._device = device
        self._work = work
        self._calibration = calibration or Calibration()
        self._precision = recipe.train.precision
        self.usable = int(device.memory * (1 - allowance("fragmentation")))
        self._engine_weight = 1 if recipe.fp8.rollouts else memory.weight_bytes(self._precision)
        self._runtime = round(allowance("runtime_gib" if device.gpu else "cpu_runtime_gib") * GIB)
        self._state = functools.cache(self._state_uncached)
        self._weights = functools.cache(self._weights_uncached)
        self._scoring = functools.cache(self._scoring_uncached)
        self._activations = functools.cache(self._activations_uncached)
        self._train_seconds = functools.cache(self._train_seconds_uncached)

    def judge(self, setup: Setup) -> Plan:
        """Memory and time of a setup that divides as it must (see `undivided`)."""
        phases = self._phases(setup)
        missing = {
            name: total - self.usable for name, parts in phases.items() if (total := sum(parts.values())) > self.usable
        }
        host = self._host_bytes(setup) * self._device.per_node
        problems = {name: self._problem(name, phases[name]) for name in missing}
        if host > self._device.host_memory * self._device.per_node:
            node = self._device.host_memory * self._device.per_node
            missing["host"] = host - node
            problems["host"] = f"the host of a node would hold {_gib(host)} of {_gib(node)}: {_MENDS['host']}"
        tokens = self._work.responses * self._work.response_tokens
        return Plan(setup, phases, self._seconds(setup, phases), problems, missing, tokens)

    def best(self, ranks: int, count: int) -> tuple[list[Plan], list[Plan]]:
        """The `count` fastest setups that fit on so many ranks, and the nearest misses, one for each phase.

        More context parallelism costs more exchange than data parallelism, and is tried where memory lacks: where
        nothing fits with less of it, or only what computes layers again.
        """
        fitting: list[Plan] = []
        misses: dict[str, Plan] = {}
        for context in _SIZES:
            if any(not plan.setup.recompute for plan in fitting):
                break
            for setup in self._setups(ranks, context):
                plan = self.judge(setup)
                if not plan.missing:
                    fitting.append(plan)
                for phase in list(plan.missing)[:1]:
                    if phase not in misses or sum(plan.missing.values()) < sum(misses[phase].missing.values()):
                        misses[phase] = plan
        return sorted(fitting, key=lambda plan: plan.step_seconds)[:count], list(misses.values())

    def nearest(self, ranks: int) -> Plan | None:
        """The fastest setup on the smallest power of two of ranks, above `ranks`, on which one fits."""
        for more in (1 << i for i in range(14) if 1 << i > ranks):
            if found := self.best(more, 1)[0]:
                return found[0]
        return None

    def undivided(self, setup: Setup) -> str | None:
        """Why models, ranks and batch do not divide as the setup asks; None if they do."""
        try:
            check_divides(setup, self._student, self._teacher, self._work.responses)
            check_context(setup.context, self._work.row_tokens, self._method)
            check_fp8_layout(self._recipe, setup, self._student, self._teacher)
            if self._teacher is not None and self._recipe.sgopd.estimator == "full":
                layouts = setup.student.layout, setup.teacher.layout
                check_full_estimator(self._student, self._teacher, *layouts, setup.offload)
        except ConfigError as error:
            return str(error)
        return None

    # ---- Search -----------------------------------------------------------------------------------------

    def _setups(self, ranks: int, context: int) -> Iterator[Setup]:
        """Layouts that divide, each with the engine's share left open."""
        within = [size for size in _SIZES if size <= self._device.per_node]
        own = setup_of(self._recipe, ranks)
        alone = replace(
            own,
            context=context,
            distributed_optimizer=own.distributed_optimizer or self._device.gpu,
            teacher_tensor=1,
            teacher_pipeline=1,
            teacher_expert=1,
            offload=False,
            rollout_tensor=1,
            memory_fraction=None,
        )
        experts = within if self._student.num_experts else [1]
        students = itertools.product(within, _SIZES, experts, (1, 2, 4), (False, True))
        experts = within if self._teacher is not None and self._teacher.num_experts else [1]
        teachers = list(itertools.product(within, _SIZES, experts, (False, True)))
        for tensor, pipeline, expert, rows, recompute in students:
            first = replace(
                alone,
                tensor=tensor,
                pipeline=pipeline,
                expert=expert,
                rows_per_microbatch=rows,
                recompute=recompute,
                sequence=tensor > 1 and self._device.gpu,
            )
            same = replace(first, teacher_tensor=tensor, teacher_pipeline=pipeline)
            if self._teacher is None:
                teachers = [(tensor, pipeline, 1, False)]  # whose rows count as the student's
            elif self.undivided(same) and self.undivided(first):
                continue
            if self._state(first.student.layout, first.optimizer_shards).total > self.usable:
                if not self.undivided(offloaded := replace(same, offload=True)):
                    yield self._with_share(offloaded)  # to say how much is missing
                continue
            for teacher_tensor, teacher_pipeline, expert, offload in teachers:
                second = replace(
                    first,
                    teacher_tensor=teacher_tensor,
                    teacher_pipeline=teacher_pipeline,
                    teacher_expert=expert,
                    offload=offload,
                )
                if self.undivided(second):
                    continue
                for rollout in within:
                    setup = replace(second, rollout_tensor=rollout)
                    if not self.undivided(setup):
                        yield self._with_share(setup)

    def _with_share(self, setup: Setup) -> Setup:
        """The engine's share set to what the others leave it, on a GPU."""
        if not self._device.gpu:
            return setup
        room = self.usable - sum(self._resident(setup).values())
        share = math.floor(100 * min(room / self._device.memory, ALONE_MEMORY_FRACTION)) / 100
        return replace(setup, memory_fraction=max(0.01, share))

    # ---- Memory -----------------------------------------------------------------------------------------

    def _state_uncached(self, layout: ParallelLayout, shards: int) -> memory.TrainingState:
        """Of the stage that has most."""
        stages, fp8 = {0, layout.pipeline - 1}, self._recipe.fp8.format is not None
        found = [memory.training_state(self._student, layout, s, self._precision, shards, fp8) for s in stages]
        return max(found, key=lambda state: state.total)

    def _scored(self, name: str) -> Architecture:
        architecture = self._teacher if name == "teacher" else self._student
        assert architecture is not None
        return architecture

    def _weights_uncached(self, name: str, layout: ParallelLayout) -> int:
        """Of a frozen model, on the stage that has most."""
        architecture = self._scored(name)
        most = max(memory.shard_elements(architecture, layout, stage) for stage in {0, layout.pipeline - 1})
        # Transformer Engine keeps an FP8 copy of each weight that it multiplies by.
        return most * (memory.weight_bytes(self._precision) + (self._recipe.fp8.teacher is not None))

    def _spreads(self, setup: Setup) -> dict[str, Spread]:
        """Of the models that score."""
        teacher = {} if self._teacher is None else {"teacher": setup.teacher}
        return teacher | ({"reference": setup.student} if self._method.needs_reference else {})

    def _scorers(self, setup: Setup) -> dict[str, int]:
        """Their weights."""
        return {name: self._weights(name, spread.layout) for name, spread in self._spreads(setup).items()}

    def _host_bytes(self, setup: Setup) -> int:
        """Of a rank on the host, while a checkpoint is saved."""
        offloaded = sum(self._scorers(setup).values()) if setup.offload else 0
        if not (self._device.gpu and setup.distributed_optimizer and setup.reshardable):
            return offloaded
        # Each rank gathers the masters and both moments of its whole shard of the model, in float32.
        return offloaded + self._state(setup.student.layout, 1).optimizer

    def _resident(self, setup: Setup) -> dict[str, int]:
        """What is there in all phases."""
        state = self._state(setup.student.layout, setup.optimizer_shards)
        resident = {"runtime": self._runtime, "student": state.total}
        return resident if setup.offload else resident | self._scorers(setup)

    def _engine_weights(self, setup: Setup) -> int:
        return parameter_count(self._student) * self._engine_weight // setup.rollout_tensor

    def _engine(self, setup: Setup) -> dict[str, int]:
        """While it generates."""
        weights = self._engine_weights(setup)
        if not self._device.gpu:
            return {"engine": weights, "cache": round(self._recipe.rollout.cache_gib * GIB)}
        assert setup.memory_fraction is not None
        fixed = weights + round(allowance("engine_awake_gib") * GIB)
        share = round(setup.memory_fraction * self._device.memory)
        needed = memory.cache_bytes_per_token(self._student) * self._work.row_tokens // setup.rollout_tensor
        return {"engine": fixed, "cache": max(share - fixed, needed)}

    def _alike(self, setup: Setup) -> bool:
        quantized = self._recipe.fp8.rollouts is not None
        return split_alike(self._student, setup.student.layout, setup.rollout_tensor, quantized)

    def _phases(self, setup: Setup) -> dict[str, dict[str, int]]:
        resident, engine = self._resident(setup), self._engine(setup)
        asleep = {"engine": round(allowance("engine_asleep_gib") * GIB)} if self._device.gpu else engine
        largest = 2 * self._student.hidden_size * padded_vocab_size(self._student, setup.tensor)
        bucket = self._recipe.rollout.sync_bucket_mib * 2**20 + largest
        if setup.tensor == 1 and self._alike(setup):
            bucket = 0  # nothing is sent, not even a vocabulary that is padded otherwise
        phases = {
            "sync": resident | engine | {"cache": 0 if self._device.gpu else engine["cache"], "bucket": bucket},
            "generate": resident | engine,
        }
        microbatch = setup.rows_per_microbatch
        for name, spread in self._spreads(setup).items():
            phases[name] = resident | asleep | self._scoring(name, spread, microbatch)
        rows = self._work.rows(setup.shares)
        phases["train"] = resident | asleep | self._activations(setup.student, microbatch, setup.recompute, rows)
        return phases

    def _scoring_uncached(self, name: str, spread: Spread, microbatch: int) -> dict[str, int]:
        architecture = self._scored(name)
        tokens = microbatch * self._work.row_tokens // spread.context
        layer = self._layer_bytes(architecture, spread, microbatch)
        logits = self._chunk_logits(architecture, spread.layout.tensor, tokens)
        output = memory.output_bytes(architecture, spread.layout, tokens, logits, train=False)
        return {name: self._weights(name, spread.layout), "activations": layer, "output layer": output}

    def _activations_uncached(self, spread: Spread, microbatch: int, recompute: bool, rows: int) -> dict[str, int]:
        architecture, (tensor, pipeline) = self._student, (spread.layout.tensor, spread.layout.pipeline)
        tokens = microbatch * self._work.row_tokens // spread.context
        layer = self._layer_bytes(architecture, spread, microbatch)
        layers = architecture.num_layers // pipeline
        kept = memory.layer_input_bytes(architecture, spread.layout, tokens, spread.sequence)
        of_stage = layers * (kept if recompute else layer) + (layer if recompute else 0)
        in_flight = min(pipeline, spread.microbatches(rows, microbatch))
        first = {"activations": in_flight * of_stage, "output layer": 0}
        logits = self._chunk_logits(architecture, tensor, tokens)
        output = memory.output_bytes(architecture, spread.layout, tokens, logits, train=True)
        last = {"activations": of_stage, "output layer": output}
        return max(first if pipeline > 1 else last, last, key=lambda parts: sum(parts.values()))

    def _layer_bytes(self, architecture: Architecture, spread: Spread, rows: int) -> int:
        row_tokens, context = self._work.row_tokens, spread.context
        if self._device.gpu:
            tokens = rows * row_tokens // context
            return memory.fused_activation_bytes(architecture, spread.layout, tokens, spread.sequence)
        return memory.activation_bytes(architecture, spread.layout, rows, row_tokens, self._precision, context)

    def _chunk_logits(self, architecture: Architecture, tensor: int, tokens: int) -> int:
        rows = padded_vocab_size(architecture, tensor) // tensor
        return rows * min(tokens, self._recipe.sgopd.logprob_chunk_tokens or default_chunk_tokens(rows))

    def _problem(self, phase: str, parts: dict[str, int]) -> str:
        largest = sorted(parts.items(), key=lambda part: -part[1])
        said = ", ".join(f"{name} {_gib(nbytes)}" for name, nbytes in largest if nbytes > GIB // 10)
        total = _gib(sum(parts.values()))
        return f"{phase} needs {total} of {_gib(self.usable)} on a rank ({said}): {_MENDS[phase]}"

    # ---- Time -------------------------------------------------------------------------------------------

    def _train_seconds_uncached(
        self, spread: Spread, rows: int, microbatch: int, recompute: bool, shards: int
    ) -> float:
        work, device, fp8 = self._work, self._device, self._recipe.fp8.format is not None
        return times.train_seconds(self._student, spread, work, rows, microbatch, device, recompute, shards, fp8)

    def _seconds(self, setup: Setup, phases: dict[str, dict[str, int]]) -> dict[str, float]:
        work, device, microbatch = self._work, self._device, setup.rows_per_microbatch
        rows = work.rows(setup.shares)
        cache = phases["generate"]["cache"]
        seconds = {
            "sync": times.sync_seconds(self._student, setup.student, device, self._alike(setup)),
            "generate": times.generate_seconds(
                self._student, setup.ranks, setup.rollout_tensor, work, cache, device, self._engine_weight
            ),
        }
        fp8 = self._recipe.fp8.teacher is not None
        for name, spread in self._spreads(setup).items():
            seconds[name] = times.forward_seconds(self._scored(name), spread, work, rows, microbatch, device, fp8)
            if setup.offload:
                seconds[name] += times.host_seconds(self._weights(name, spread.layout), device)
        shards = setup.optimizer_shards
        seconds["train"] = self._train_seconds(setup.student, rows, microbatch, setup.recompute, shards)
        verify = times.verify_seconds(work.responses, setup.ranks * self._recipe.verify.workers)
        seconds["verify"] = max(0.0, verify - seconds.get("teacher", 0.0) - seconds.get("reference", 0.0))
        return {stage: self._calibration.of(stage, value) for stage, value in seconds.items()}


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"
