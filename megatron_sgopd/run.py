"""What a run needs besides Megatron's own objects: built once, when the first step starts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sgopd.checkpoint.files import model_digest, write_atomically
from megatron_sgopd.checks import PROMPTS_DIGEST, Inputs, check_inputs, check_same_prompts
from megatron_sgopd.cluster.hardware import GIB
from megatron_sgopd.cluster.plan import check_context, check_full_estimator
from megatron_sgopd.config import Settings
from megatron_sgopd.errors import ConfigError, Stopped
from megatron_sgopd.evaluation.heldout import respond
from megatron_sgopd.evaluation.protocol import protocol
from megatron_sgopd.fp8 import check_tokens, prove_fp8
from megatron_sgopd.models.microbatch import unwrapped
from megatron_sgopd.models.policy import PolicyStep, Student
from megatron_sgopd.models.provider import check_model, set_rotary_frequencies
from megatron_sgopd.models.scorer import Scorer
from megatron_sgopd.models.weight_map import ParallelLayout
from megatron_sgopd.models.weights import load_weights
from megatron_sgopd.monitor.alarms import check_metrics, check_skipped
from megatron_sgopd.monitor.clock import Clock
from megatron_sgopd.monitor.heartbeat import Heartbeat
from megatron_sgopd.monitor.metrics import Monitor
from megatron_sgopd.monitor.output import RESOLVED, run_folder
from megatron_sgopd.monitor.samples import sample_lines
from megatron_sgopd.objective.methods import Method
from megatron_sgopd.platform import current
from megatron_sgopd.recipe import load_recipe, plan_here
from megatron_sgopd.residency import Residency, Tenant
from megatron_sgopd.rollout.engine import RolloutEngine
from megatron_sgopd.rollout.prompts import Prompt, PromptStream
from megatron_sgopd.rollout.recording import Recording
from megatron_sgopd.rollout.teacher_rollouts import TeacherRollouts, teacher_engine
from megatron_sgopd.step import Batch, batch_metrics, prepare, signals, sync
from megatron_sgopd.stopping import StopRequest
from megatron_sgopd.verify.stage import FAULT_METRICS, Verification

NOTICE_SECONDS = "SGOPD_NOTICE_SECONDS"
"""Environment variable of slurm/train.sbatch: seconds between Slurm's signal and the end of the job."""


@dataclass
class Run:
    """Models, engine, prompts and monitors of this process."""

    settings: Settings
    method: Method
    student: Student
    teacher: Scorer | None
    reference: Scorer | None
    engine: RolloutEngine | None
    """None where recorded batches are replayed: then nothing is generated or evaluated."""
    teacher_rollouts: TeacherRollouts | None
    """None where the schedule never wants any, or their batches are replayed."""
    verification: Verification
    inputs: Inputs
    prompts: PromptStream
    recording: Recording
    monitor: Monitor
    clock: Clock
    seed: int
    row_tokens: int
    rows_per_microbatch: int
    stop_request: StopRequest
    residency: Residency
    truncated_history: list[bool] = field(default_factory=list)
    skipped_steps: int = 0
    """Without anything to train on, those before this attempt included."""
    skipped_in_a_row: int = 0
    _had_a_step: bool = False
    """In this process."""

    def before_training(self, step: int) -> tuple[Batch, PolicyStep]:
        """The stages up to the optimizer step."""
        self.clock.heartbeat.step = step
        batch = prepare(self, step)
        tokens, outcomes_T, counted_T = signals(self, batch)
        policy = PolicyStep(
            self.student,
            tokens,
            outcomes_T,
            counted_T,
            self.method,
            self.settings.rollout.temperature,
            self.settings.sgopd.logprob_chunk_tokens,
            self.teacher if self.method.estimator == "full" else None,
            self.settings.teacher_rollouts.temperature,
        )
        return batch, policy

    def after_training(
        self, batch: Batch, updates: Sequence[PolicyStep], grad_norms: Sequence[float], clip_grad: float, last: bool
    ) -> None:
        """Records, alarms and evaluations of the step that was just trained.

        Args:
            updates: the optimizer steps on this batch, of which the first one's statistics are the step's.
            grad_norms: of each of them, before clipping.
            clip_grad: where they were clipped.
        """
        done = batch.step + 1
        with self.clock("record"):
            policy = updates[0]
            metrics: dict[str, Any] = policy.metrics() | batch_metrics(batch) | self.verification.faults
            if len(updates) > 1:
                metrics["ratio_clipped"] = updates[-1].metrics()["ratio_clipped"]
            metrics |= {
                "noise_floor": self.method.noise_floor,
                "teacher_forwards": self.teacher.forwards if self.teacher else 0,
                "reference_forwards": self.reference.forwards if self.reference else 0,
                "weight_version": self.engine.weight_version if self.engine else 0,
            }
            metrics["grad_norm"] = next((norm for norm in grad_norms if not math.isfinite(norm)), grad_norms[0])
            metrics["grad_clipped"] = sum(norm > clip_grad for norm in grad_norms) / len(grad_norms)
            self._count_skipped(batch.step, policy.trains)
            metrics["skipped_steps"] = self.skipped_steps
            check_metrics(self.settings.alarms, batch.step, metrics)
            if not self._had_a_step and self.student.model.config.fp8:  # scorers prove it where they score
                prove_fp8(self.student.model)
            self._set_noise_floor(metrics["logprob_gap_p95"])
            self.recording.save(batch, lambda: policy.student_logprobs_T)
            samples = self._samples(batch, policy) if self.keeps_samples(batch.step) else []
        every = self.settings.evaluate.every
        if last or (every and done % every == 0):
            self.evaluate("after" if last else "step", done)
        stages, seconds = self.clock.lap()
        peaks = self.residency.lap()
        metrics |= {
            "step": done,
            "seconds": seconds,
            "stage_seconds": stages,
            "phase_memory_mib": {name: nbytes / 2**20 for name, nbytes in peaks.items()},
            "unexplained_share": 1 - sum(stages.values()) / seconds,
            "tokens_per_second": metrics["response_tokens"] / seconds,
        }
        self.monitor.step(metrics)
        self.monitor.samples(samples)
        if not self._had_a_step:
            self._compare_memory(peaks)
        self._had_a_step = True
        if last:
            self.monitor.summary()
            self.verification.close()
            self.clock.heartbeat.stop()

    def after_saving(self, size: int, seconds: float, last: bool) -> None:
        """Say how long it took, and whether there will be time for it when the run is asked to stop.

        Args:
            size: of the checkpoint in bytes.
        """
        self.monitor.note(f"checkpoint saved: {size / 2**20:.1f} MiB in {seconds:.1f} s")
        notice = int(os.environ.get(NOTICE_SECONDS) or 0)
        stage, longest = self.clock.heartbeat.longest_stage()
        if notice and notice < longest + seconds:
            self.monitor.note(
                f"the job is signalled {notice} s before it is ended, but {stage} takes up to {longest:.0f} s and a "
                f"save {seconds:.0f} s: give sbatch --signal=B:USR1@{round(2 * (longest + seconds))} or more"
            )
        if last:
            self.clock.heartbeat.stop()
            run_dir = shlex.quote(self.settings.run_dir)
            self.monitor.note(
                f"look at it:   megatron-sgopd report {run_dir}\n"
                f"take it out:  megatron-sgopd export {run_dir} OUT\n"
                f"evaluate it:  megatron-sgopd eval {run_dir} --out OUT"
            )

    def stop_if_asked(self, step: int) -> None:
        """A safe point: the stages before the optimizer step change nothing that is saved.

        Raises:
            Stopped: on all ranks, if one of them was signalled.
        """
        if (name := self.stop_request.asked()) is not None:
            raise Stopped(f"stopped by {name}, received in {self.stop_request.stage}, after {step} steps")

    def keeps_samples(self, step: int) -> bool:
        """Some of this step's responses go to samples.jsonl."""
        every = self.settings.logging.samples_every
        return every > 0 and step % every == 0

    def _samples(self, batch: Batch, policy: PolicyStep) -> list[dict[str, Any]]:
        student_logprobs_T = policy.student_logprobs_T  # a collective
        if dist.get_rank() > 0:
            return []
        return sample_lines(
            batch,
            self.verification.checked,
            self.settings.logging.samples,
            student_logprobs_T,
            policy.signals,
            policy.method,
            self.inputs.tokenizer,
        )

    def _compare_memory(self, peaks: dict[str, int]) -> None:
        """Say what each phase of this process's first step took, and what the planner says of the run's recipe."""
        path = Path(self.settings.run_dir) / RESOLVED
        if not path.is_file():
            return  # a script of the user's own
        recipe = load_recipe(path)
        plan = plan_here(recipe, self.method, current().planned_as)
        planned = {name: sum(parts.values()) for name, parts in plan.phases.items()}
        said = (f"{name} {peaks[name] / GIB:.2f} ({planned[name] / GIB:.2f})" for name in planned if name in peaks)
        self.monitor.note(f"GiB in use at most on the first rank, and planned: {', '.join(said)}")

    def _count_skipped(self, step: int, trains: bool) -> None:
        self.skipped_in_a_row = 0 if trains else self.skipped_in_a_row + 1
        self.skipped_steps += not trains
        if not trains:
            check_skipped(self.settings.alarms, step, self.skipped_in_a_row)
            self.monitor.note(
                f"step {step + 1}: settings leave every response out: there is nothing to train on, and the weights "
                "stay as they are"
            )

    def _set_noise_floor(self, logprob_gap: float) -> None:
        """For the next step, where the setting is `auto`."""
        if self.method.measured_noise_floor and not math.isnan(logprob_gap):
            self.method = dataclasses.replace(self.method, noise_floor=logprob_gap)

    def evaluate(self, name: str, step: int) -> None:
        """Pass rate of the student as it is now, if there are held-out prompts and an engine."""
        if self.engine is None or self.inputs.heldout is None:
            return
        sync(self)
        with self.clock("evaluate"), self.residency("generate"):
            settings = self.settings.evaluate
            responses = respond(self.engine, self.verification, self.inputs.heldout, settings, self.seed)
        self.monitor.evaluation(name, step, responses, protocol(self.settings, self.inputs.heldout))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A stage whose time is counted, with what it needs on the device."""
        with self.clock(name), self.residency(name):
            yield

    @property
    def scorers(self) -> list[Scorer]:
        """Teacher and reference, as far as the method needs them."""
        return [scorer for scorer in (self.teacher, self.reference) if scorer is not None]

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step: a function of seed and step alone, so that resuming needs nothing else."""
        size = self.settings.rollout.prompts_per_step
        self.prompts.seek(step * size)
        return self.prompts.next(size)


def start(settings: Settings, args: Any, model: Any, optimizer: Any, stop_request: StopRequest) -> Run:
    """Load the student's weights into Megatron's fresh model, and build everything around it.

    Args:
        args: Megatron's parsed arguments; `args.iteration` > 0 means that a checkpoint was loaded.

    Raises:
        ConfigError: something does not fit, found before the expensive parts are built where possible.
    """
    run_dir = run_folder(settings)
    heartbeat = Heartbeat(run_dir, dist.get_rank(), settings.alarms)
    stop_request.heartbeat, clock = heartbeat, Clock(heartbeat)
    inputs = check_inputs(settings, args.seq_length, args.seed)
    _check_arguments(settings, args, model)
    check_context(args.context_parallel_size, args.seq_length, inputs.method)
    _check_engines(settings, inputs)
    if args.iteration > 0:
        check_same_prompts(run_dir, inputs)
    elif dist.get_rank() == 0:
        write_atomically(run_dir / PROMPTS_DIGEST, inputs.prompts_digest.encode())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    student = Student(unwrapped(model[0]), inputs.student, groups)
    set_rotary_frequencies(student.model, inputs.student)
    check_model(student.model, inputs.student)
    if args.iteration == 0:
        load_weights(student.model, inputs.student, groups)
        optimizer.reload_model_params()
    method, rollout = inputs.method, settings.rollout

    def scorer(architecture: Any, tensor: int, pipeline: int, keeps_hidden: bool = False, expert: int = 1) -> Scorer:
        return Scorer(
            architecture,
            student.model.config,
            tensor,
            pipeline,
            settings.teacher.offload,
            settings.sgopd.logprob_chunk_tokens,
            keeps_hidden,
            expert,
            settings.fp8.teacher,
        )

    tensor, pipeline = groups.tp.size(), groups.pp.size()
    teacher_tensor = settings.teacher.tensor_parallel or tensor
    teacher_pipeline = settings.teacher.pipeline_parallel or pipeline
    full = method.estimator == "full"
    if full:
        layouts = ParallelLayout(tensor, pipeline), ParallelLayout(teacher_tensor, teacher_pipeline)
        check_full_estimator(inputs.student, inputs.teacher, *layouts, settings.teacher.offload)
    monitor = Monitor(settings, args.iteration, args.train_iters)
    verification = Verification(settings.verify, inputs.tokenizer, monitor.last_metrics(FAULT_METRICS), heartbeat.alive)
    if settings.evaluate.teacher and inputs.heldout is not None and args.iteration == 0 and not settings.logging.replay:
        _evaluate_teacher(settings, args, inputs, verification, monitor)
    teacher = reference = engine = None
    if method.teacher:
        expert = settings.teacher.expert_parallel
        teacher = scorer(inputs.teacher, teacher_tensor, teacher_pipeline, full, expert)
    if method.needs_reference:
        reference = scorer(inputs.student, tensor, pipeline, expert=groups.ep.size())
    if not settings.logging.replay:
        quantization = settings.fp8.rollouts
        engine = RolloutEngine(settings.model.path, rollout, args.seq_length, args.seed, quantization=quantization)
        engine.release()
    tenants: dict[str, Tenant | None] = {
        "engine": engine,
        "teacher": teacher.hosted if teacher else None,
        "reference": reference.hosted if reference else None,
    }
    run = Run(
        settings,
        method,
        student,
        teacher,
        reference,
        engine,
        None,
        verification,
        inputs,
        PromptStream(inputs.train, args.seed),
        Recording(
            settings.logging.replay,
            settings.logging.record,
            inputs.student.vocab_size,
            inputs.train if settings.verify.verifier == "task" else None,
            _scored_by(settings),
        ),
        monitor,
        clock,
        args.seed,
        args.seq_length,
        args.micro_batch_size,
        stop_request,
        Residency({name: tenant for name, tenant in tenants.items() if tenant is not None}),
    )
    if inputs.bank is not None and not settings.logging.replay:
        run.teacher_rollouts = TeacherRollouts(
            settings,
            inputs.bank,
            verification,
            lambda: _teacher_engine(settings, args),
            run.prompts_of,
            monitor.note,
            args.seed,
        )
    last = monitor.last_metrics(
        ["skipped_steps", "noise_floor", "logprob_gap_p95"]
    )  # a step without a gap leaves the floor as it is
    run.skipped_steps = int(last.get("skipped_steps", 0))
    run._set_noise_floor(last.get("logprob_gap_p95", last.get("noise_floor", math.nan)))
    for name, prompts in (("data.train", inputs.train), ("data.heldout", inputs.heldout)):
        if prompts is not None and prompts.unusable:
            monitor.note(f"{name}: {prompts.unusable} rows cannot be used and are left out: {prompts.problems[0]}")
    for remark in inputs.remarks:
        monitor.note(remark)
    if inputs.train.excluded:
        monitor.note(f"{inputs.train.excluded} training prompts left out: they are held-out ones")
    monitor.note(f"models and engine are ready after {clock.since_lap():.0f} s")
    if args.iteration == 0:
        run.evaluate("before", 0)
    clock.lap()
    return run


def _scored_by(settings: Settings) -> dict[str, str]:
    if not (settings.logging.replay or settings.logging.record):
        return {}
    folders = {"teacher": settings.teacher.path, "reference": settings.model.path}
    digests = {name: model_digest(Path(folder)) for name, folder in folders.items()}
    return digests | {"temperature": str(settings.rollout.temperature)}


def _evaluate_teacher(
    settings: Settings, args: Any, inputs: Inputs, verification: Verification, monitor: Monitor
) -> None:
    assert inputs.heldout is not None
    engine = _teacher_engine(settings, args)
    responses = respond(engine, verification, inputs.heldout, settings.evaluate, args.seed)
    monitor.evaluation("teacher", 0, responses, protocol(settings, inputs.heldout))
    engine.close()


def _teacher_engine(settings: Settings, args: Any) -> RolloutEngine:
    return RolloutEngine(settings.teacher.path, teacher_engine(settings), args.seq_length, args.seed)


def _check_engines(settings: Settings, inputs: Inputs) -> None:
    """No more engines are wanted in a process than the platform allows."""
    if current().several_engines:
        return
    if inputs.bank is not None and settings.teacher_rollouts.bank is None:
        raise ConfigError(
            "teacher_rollouts.bank is not set, and on this platform a run cannot make the teacher's rollouts beside "
            "the student's: make them before by `megatron-sgopd teacher-rollouts`, and name their folder"
        )
    if settings.evaluate.teacher:
        raise ConfigError(
            "evaluate.teacher is not possible on this platform, where a process has one engine: leave it out, and use "
            "`megatron-sgopd eval` on the teacher's folder"
        )


def _check_arguments(settings: Settings, args: Any, model: Any) -> None:
    """What a user's own Megatron command line must say for the plugin to work."""
    responses = settings.rollout.prompts_per_step * settings.rollout.group_size
    problems = [
        (len(model) > 1, "--num-layers-per-virtual-pipeline-stage is not supported: leave it out"),
        (
            args.hybrid_context_parallel,
            "--hybrid-context-parallel must be off: rows are packed, and split over --context-parallel-size ranks",
        ),
        (
            len(args.cp_comm_type) > 1,
            f"--cp-comm-type {' '.join(args.cp_comm_type)} must be one for all layers: the teacher has others",
        ),
        (
            args.overlap_param_gather,
            "--overlap-param-gather must be off: Megatron would gather the weights of a step only in the next forward "
            "pass, after they were sent to the rollout engine",
        ),
        (
            args.cuda_graph_impl != "none",
            f"--cuda-graph-impl {args.cuda_graph_impl} must be none: the packed rows of each microbatch differ",
        ),
        (
            args.fp8_param_gather,
            "--fp8-param-gather must be off: the weights are read as numbers for the rollout engine and its digests",
        ),
        (args.decoder_seq_length is not None, "--decoder-seq-length must be left out: rows have --seq-length tokens"),
        (args.moe_single_grouped_weight, "--moe-single-grouped-weight must be off: experts are named one by one"),
        (
            bool(args.fp8) and args.transformer_impl != "transformer_engine",
            f"--fp8-format {args.fp8} needs --transformer-impl transformer_engine, not {args.transformer_impl}, with "
            "which Megatron would train in BF16 without a word",
        ),
        (
            args.async_save and not current().saves_in_background,
            "--async-save is not possible on this platform: the process in which Megatron saves takes a GPU",
        ),
        (
            args.clip_grad == 0,
            "--clip-grad 0 must be inf: with 0 Megatron does not take the gradient's norm, and one that is no number "
            "would be saved",
        ),
        (
            bool(args.num_experts) and _balances_experts(args),
            "--moe-aux-loss-coeff and --moe-z-loss-coeff must be 0, or left out: Megatron divides these losses by all "
            "tokens of the rows, and the others by those of the responses",
        ),
        (
            not args.calculate_per_token_loss,
            "--calculate-per-token-loss is needed: the loss is a mean over tokens",
        ),
        (
            args.global_batch_size != responses,
            f"--global-batch-size is {args.global_batch_size}, but a step has {responses} responses "
            "(rollout.prompts_per_step x rollout.group_size): make them equal",
        ),
    ]
    for wrong, message in problems:
        if wrong:
            raise ConfigError(message)
    current().check_training("bf16" if args.bf16 else "float32")
    if settings.fp8.teacher:
        current().check_fp8(settings.fp8.teacher)
    if args.fp8:
        current().check_fp8(args.fp8_recipe)
        sequence = args.tensor_model_parallel_size if args.sequence_parallel else 1
        check_tokens("--fp8-format", args.seq_length, args.context_parallel_size * sequence, args.fp8_recipe)


def _balances_experts(args: Any) -> bool:
    """Megatron adds a loss of its own to the routers' gradients."""
    coefficients = args.moe_aux_loss_coeff if isinstance(args.moe_aux_loss_coeff, list) else [args.moe_aux_loss_coeff]
    return any(coefficients) or bool(args.moe_z_loss_coeff)
