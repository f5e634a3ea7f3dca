"""torchrun --nproc-per-node N -m megatron_sgopd.pretrain <Megatron flags> <--sgopd-* flags>

A ready Megatron script with the plugin registered; `megatron-sgopd train RECIPE` starts this one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_sgopd import register
from megatron_sgopd.checkpoint.completeness import newest_step
from megatron_sgopd.config import Settings, parse_flags
from megatron_sgopd.monitor.attempts import begin_attempt, end_attempt
from megatron_sgopd.monitor.output import EXIT_STOPPED, Result, claimed, reporting_errors, run_folder
from megatron_sgopd.processes import (
    NO_HUB,
    RUN_HELD,
    begin_rank,
    end_with_rank,
    hold_stop_signals,
    is_first_rank,
    rendezvous,
)


def main(prepare: Callable[[], None] = lambda: None) -> int:
    """Parse Megatron's and the plugin's flags, and train.

    Args:
        prepare: called by the first rank once the run folder is its own.
    """
    os.environ.update(NO_HUB | os.environ)
    begin_rank()
    hold_stop_signals()  # one that arrives while the libraries load is found when the run listens
    settings, _ = parse_flags(sys.argv[1:])
    run_dir = run_folder(settings)
    if not is_first_rank():
        result = _train(settings)
        _wait_if_stopped(result)
        return result.code
    checkpoints = run_dir / "checkpoints"
    held = os.environ.get(RUN_HELD) == str(run_dir)  # by `megatron-sgopd train`, which lives as long
    with contextlib.nullcontext() if held else claimed(run_dir):
        prepare()
        begin_attempt(run_dir, newest_step(checkpoints))
        result = _train(settings)
        end_attempt(run_dir, newest_step(checkpoints), result.code, result.reason)
        _wait_if_stopped(result)
    return result.code


def _wait_if_stopped(result: Result) -> None:
    """All ranks: until the first one has written the attempt's end. Slurm kills them when one has ended."""
    if result.code == EXIT_STOPPED:
        import torch.distributed as dist

        dist.barrier()


def _train(settings: Settings) -> Result:
    with reporting_errors(settings.run_dir, settings.logging.quiet) as result:
        register()
        from megatron.core.enums import ModelType
        from megatron.training import pretrain
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        from megatron_sgopd.models.architecture import read_architecture

        architecture = read_architecture(settings.model.path)
        args = parse_and_validate_args()
        pretrain(
            pretrain_cfg_container_from_args(args),
            _no_datasets,
            ModelType.encoder_or_decoder,
            forward_step_func=None,  # the plugin brings its own
            model_provider=_model_provider(architecture),
            store=rendezvous(),
        )
    return result


def _no_datasets(num_samples: Any) -> tuple[Any, None, None]:
    """Megatron trains only where it has an iterator; the plugin feeds it from rollouts."""
    return iter(()), None, None


_no_datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron's mark: build on every rank


def _model_provider(architecture: Any) -> Any:
    def provider(
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        from megatron.training import get_args
        from megatron.training.argument_utils import core_transformer_config_from_args

        from megatron_sgopd.models.provider import build_model

        args = get_args()
        return build_model(
            architecture,
            config or core_transformer_config_from_args(args),
            pg_collection,
            pre_process,
            post_process,
            args.padded_vocab_size,
            vp_stage,
        )

    return provider


end_with_rank()
if __name__ == "__main__":
    sys.exit(main())
