"""`register()`: SG-OPD inside Megatron's own training loop. The only module that knows `megatron.training`.

Three functions that Megatron's loop calls are wrapped. `train_step`, which every rank calls once a step: rollouts and
scoring run there, before the pipeline schedule starts, and then Megatron's own function trains on the batch, with
microbatches and forward step as its arguments. `save_checkpoint` and `load_checkpoint`: a checkpoint gets a manifest
when it is whole, and only a whole one is loaded.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from megatron_sgopd.checkpoint.saving import Saves
from megatron_sgopd.config import Settings, parse_flags
from megatron_sgopd.errors import Stopped
from megatron_sgopd.platform import select
from megatron_sgopd.stopping import StopRequest


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

    import megatron.core.datasets.utils as dataset_utils
    import megatron.training.training as training

    # The wheel ships the compiled helper but no Makefile, and Megatron exits when make fails.
    dataset_utils.compile_helpers = lambda: None
    saves, stop_request = Saves(settings.checkpoint), StopRequest()
    stop_request.listen()
    training.save_checkpoint = _with_manifest(training.save_checkpoint, saves)
    training.load_checkpoint = _from_whole(training.load_checkpoint, saves)
    training.train_step = _with_rollouts(training.train_step, settings, saves, stop_request)
    return settings


def _with_manifest(save_checkpoint: Any, saves: Saves) -> Any:
    """Megatron's `save_checkpoint`, after which a checkpoint is declared whole as soon as it is."""

    @functools.wraps(save_checkpoint)
    def save(iteration: int, *arguments: Any, **keywords: Any) -> None:
        from megatron.training import get_args
        from megatron.training.async_utils import maybe_finalize_async_save

        args = get_args()
        save_checkpoint(iteration, *arguments, **keywords)
        if keywords.get("non_persistent_ckpt"):
            return
        saves.saved(Path(args.save), iteration)
        if args.async_save and iteration < args.train_iters:
            return  # while the next steps are trained
        maybe_finalize_async_save(blocking=True)
        saves.settle()

    return save


def _from_whole(load_checkpoint: Any, saves: Saves) -> Any:
    """Megatron's `load_checkpoint`, for which the newest whole checkpoint of the run is chosen."""

    @functools.wraps(load_checkpoint)
    def load(*arguments: Any, **keywords: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        if keywords.get("load_arg", "load") == "load" and args.load == args.save:
            saves.choose(Path(args.load))
        return load_checkpoint(*arguments, **keywords)

    return load


class _Held:
    """In place of Megatron's scheduler: the learning rate follows batches, not the updates on one of them."""

    def step(self, increment: int) -> None: ...


def _with_rollouts(train_step: Any, settings: Settings, saves: Saves, stop_request: StopRequest) -> Any:
    """Megatron's `train_step` with the stages of SG-OPD before and the records after it."""
    run: Any = None

    @functools.wraps(train_step)
    def step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int,
        **kwargs: Any,
    ) -> Any:
        nonlocal run
        import megatron.training.training as training
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training import get_args
        from megatron.training.async_utils import is_empty_async_queue, maybe_finalize_async_save

        from megatron_sgopd import run as runs
        from megatron_sgopd.models.microbatch import microbatches

        args = get_args()
        if args.async_save and is_empty_async_queue():
            saves.settle()
        if run is None:
            run = runs.start(settings, args, model, optimizer, stop_request)
        try:
            batch, policy = run.before_training(iteration)
        except Stopped:
            # Nothing has changed since the step before.
            if 0 < iteration != saves.newest:
                flops = args.num_floating_point_operations_so_far
                training.save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler, flops, {})
            maybe_finalize_async_save(blocking=True)
            saves.settle()
            raise
        share = batch.rows.rows // run.student.groups.dp.size()
        first = share * run.student.groups.dp.rank()
        updates = [policy]

        def schedule(**arguments: Any) -> Any:
            # The number of packed rows differs from step to step.
            return forward_backward_func(**{**arguments, "num_microbatches": share // args.micro_batch_size})

        def update(last: bool) -> Any:
            mine = microbatches(batch.rows, first, first + share, args.micro_batch_size)
            return train_step(
                updates[-1],
                RerunDataIterator(mine),
                model,
                optimizer,
                opt_param_scheduler if last else _Held(),
                config,
                schedule,
                iteration=iteration,
                **kwargs,
            )

        with run.clock("train"):
            for left in reversed(range(settings.sgopd.updates_per_batch)):
                result = update(last=left == 0)
                if left:
                    updates.append(policy.next_update())
        done = iteration + 1
        run.after_training(
            batch,
            updates,
            grad_norm=result[5],
            last=done == args.train_iters,
            saves=bool(args.save and args.save_interval and done % args.save_interval == 0),
        )
        return result

    return step
