"""`register()`: SG-OPD inside Megatron's own training loop. The only module that knows `megatron.training`.

One function of Megatron is wrapped, `megatron.training.training.train_step`, which every rank calls once a
step: rollouts and scoring run there, before the pipeline schedule starts, and then Megatron's own function
trains on the batch. Microbatches and forward step are handed to it as its arguments.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from megatron_sgopd.config import Settings, parse_flags
from megatron_sgopd.platform import select


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
    training.train_step = _with_rollouts(training.train_step, settings)
    return settings


class _Held:
    """In place of Megatron's scheduler: the learning rate follows batches, not the updates on one of them."""

    def step(self, increment: int) -> None: ...


def _with_rollouts(train_step: Any, settings: Settings) -> Any:
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
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training import get_args

        from megatron_sgopd import run as runs
        from megatron_sgopd.models.microbatch import microbatches

        args = get_args()
        if run is None:
            run = runs.start(settings, args, model, optimizer)
        batch, policy = run.before_training(iteration)
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
