"""`register()`: SG-OPD inside Megatron's own training loop. The only module that knows `megatron.training`.

Three functions that Megatron's loop calls are wrapped. `train_step`, which every rank calls once a step: rollouts and
scoring run there, before the pipeline schedule starts, and then Megatron's own function trains on the batch, with
microbatches and forward step as its arguments. `save_checkpoint` and `load_checkpoint`: a checkpoint gets a manifest
when it is whole, and only a whole one is loaded.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgopd.config import Settings, parse_flags
from megatron_sgopd.errors import ConfigError, Stopped
from megatron_sgopd.platform import current, select

if TYPE_CHECKING:
    from megatron_sgopd.run import Run


def register() -> Settings:
    """Make Megatron's next `pretrain` call train by SG-OPD.

    Call it before Megatron parses its arguments. The `--sgopd-*` flags are taken out of `sys.argv`, and the
    flags that the platform needs are put in front of the user's own. The script's forward step and datasets
    are not used; its model provider is.

    Raises:
        ConfigError: a flag is unknown, missing, or has a bad value.
    """
    settings, rest = parse_flags(sys.argv[1:])
    sys.argv[1:] = [*select(settings.platform).megatron_flags, *rest]
    if "--async-save" in rest:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

        # Megatron would fork its process once CUDA has started, and a fork outlives a rank that is killed.
        get_write_results_queue("spawn")

    import megatron.core.datasets.utils as dataset_utils
    import megatron.training.training as training

    # The wheel ships the compiled helper but no Makefile, and Megatron exits when make fails.
    dataset_utils.compile_helpers = lambda: None
    loop = _Loop(settings, training)
    training.train_step = loop.train_step
    training.save_checkpoint = loop.save_checkpoint
    training.load_checkpoint = loop.load_checkpoint
    return settings


class _Held:
    """In place of Megatron's scheduler: the learning rate follows batches, not the updates on one of them."""

    def step(self, increment: int) -> None: ...


class _Unmoved:
    """In place of an optimizer in a step that has nothing to train on: AdamW would go on by its momentum, and decay."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> tuple[bool, float, None]:
        """As if it had been successful, with the gradient's norm."""
        return True, 0.0, None


class _Loop:
    """Three functions of Megatron's loop, each with what SG-OPD does before and after it."""

    def __init__(self, settings: Settings, training: Any) -> None:
        from megatron_sgopd.checkpoint.restricted import restrict_metadata
        from megatron_sgopd.checkpoint.saving import Saves
        from megatron_sgopd.stopping import StopRequest

        restrict_metadata()
        self._settings = settings
        self._train_step = training.train_step
        self._save_checkpoint = training.save_checkpoint
        self._load_checkpoint = training.load_checkpoint
        self._save_and_time = training.save_checkpoint_and_time
        self._saves = Saves(settings.checkpoint)
        self._stop_request = StopRequest()
        self._stop_request.listen()
        self._run: Run | None = None

    def load_checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """Choose the newest whole checkpoint of the run, and load it."""
        from megatron.training import get_args

        args = get_args()
        if keywords.get("load_arg", "load") == "load" and args.load == args.save:
            self._saves.choose(Path(args.load))
            if self._saves.newest and args.use_distributed_optimizer and not current().loads_distributed_optimizer:
                raise ConfigError(
                    "--use-distributed-optimizer: on this platform Megatron cannot load its state, so that the run "
                    "cannot go on from its checkpoint: leave it out, and begin in another folder"
                )
        return self._load_checkpoint(*arguments, **keywords)

    def save_checkpoint(self, iteration: int, *arguments: Any, **keywords: Any) -> None:
        """Save, and declare the checkpoint whole as soon as it is."""
        from megatron.training import get_args

        args, began = get_args(), time.perf_counter()
        if keywords.get("non_persistent_ckpt"):
            self._save_checkpoint(iteration, *arguments, **keywords)
            return
        if iteration == self._saves.newest:
            return  # Megatron saves at its end, also what it has just loaded
        with self._run.clock("save") if self._run else contextlib.nullcontext():
            self._saves.begin(Path(args.save), iteration)
            self._save_checkpoint(iteration, *arguments, **keywords)
            self._saves.saved(Path(args.save), iteration)
            if args.async_save and iteration < args.train_iters:
                return  # while the next steps are trained
            size = self._finish_saves()
        if self._run:
            self._run.after_saving(size, time.perf_counter() - began, last=iteration == args.train_iters)

    def train_step(
        self,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int,
        **keywords: Any,
    ) -> Any:
        """The stages of SG-OPD, Megatron's optimizer steps on their batch, and the records."""
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training import get_args
        from megatron.training.async_utils import is_empty_async_queue

        from megatron_sgopd import run as runs
        from megatron_sgopd.models.microbatch import microbatches, schedule_shape

        args = get_args()
        if args.async_save and is_empty_async_queue():
            self._saves.settle()
        if self._run is None:
            self._run = runs.start(self._settings, args, model, optimizer, self._stop_request)
        run = self._run
        try:
            batch, policy = run.before_training(iteration)
        except Stopped:
            self._save_what_is_done(iteration, model, optimizer, opt_param_scheduler)
            raise
        assert batch.rows is not None
        rows = batch.rows
        share = rows.rows // run.student.groups.dp.size()
        first = share * run.student.groups.dp.rank()
        updates = [policy]
        count = self._settings.sgopd.updates_per_batch if policy.trains else 1

        def schedule(**arguments: Any) -> Any:
            # The number of packed rows differs from step to step.
            shape = schedule_shape(rows) | {"num_microbatches": share // rows.microbatch_rows}
            return forward_backward_func(**{**arguments, **shape})

        def update(last: bool) -> Any:
            mine = microbatches(rows, first, first + share, run.student.groups.cp)
            return self._train_step(
                updates[-1],
                RerunDataIterator(mine),
                model,
                optimizer if policy.trains else _Unmoved(optimizer),
                opt_param_scheduler if last else _Held(),
                config,
                schedule,
                iteration=iteration,
                **keywords,
            )

        with run.phase("train"):
            results = []
            for left in reversed(range(count)):
                results.append(update(last=left == 0))
                if left:
                    updates.append(policy.next_update())
        norms = [float(result[5]) for result in results]
        run.after_training(batch, updates, norms, args.clip_grad, last=iteration + 1 == args.train_iters)
        return results[-1]

    def _save_what_is_done(self, iteration: int, model: Any, optimizer: Any, opt_param_scheduler: Any) -> None:
        """Save the state after `iteration` steps, unless that was done at the end of the last one."""
        from megatron.training import get_args

        if 0 < iteration != self._saves.newest:
            flops = get_args().num_floating_point_operations_so_far
            self._save_and_time(iteration, model, optimizer, opt_param_scheduler, flops, {})
        self._finish_saves()

    def _finish_saves(self) -> int:
        """Wait for what is saved in the background, and declare it whole; its bytes."""
        from megatron.training.async_utils import maybe_finalize_async_save

        maybe_finalize_async_save(blocking=True)
        return self._saves.settle()
