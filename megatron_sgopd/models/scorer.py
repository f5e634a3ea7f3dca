"""Log-probs of given responses under a frozen model: the teacher, or the initial student as reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.inference.shards import build_inference_pg_collection
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_sgopd.fp8 import prove_fp8
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.hosted import HostedWeights
from megatron_sgopd.models.logprobs import OutputHead, target_logprobs, target_ranks
from megatron_sgopd.models.microbatch import (
    Microbatch,
    forward,
    microbatches,
    output_head,
    response_hidden,
    schedule_shape,
)
from megatron_sgopd.models.provider import build_model, padded_vocab_size, transformer_config
from megatron_sgopd.models.weights import load_weights
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.packing import PackedRows


class Scorer:
    """A Megatron model without optimizer or gradient buffers, with a TP/PP of its own over the same ranks."""

    def __init__(
        self,
        architecture: Architecture,
        base: TransformerConfig,
        tensor: int,
        pipeline: int,
        offload: bool,
        chunk_tokens: int,
        keeps_hidden: bool = False,
        expert: int = 1,
        fp8_recipe: str | None = None,
    ) -> None:
        """Build the model and read this rank's slices of its weights.

        Args:
            base: the run's configuration, for precision and kernels.
            offload: the weights' home is the host's memory; `hosted` must bring them in before `score`.
            keeps_hidden: keep the last hidden states of what this rank scored last, for `head`.
            expert: ranks that share the experts of each layer.
            fp8_recipe: one of Megatron's; None: the run's own precision.

        Raises:
            ConfigError: the model does not split over the ranks, or its files do not fit.
        """
        self._architecture = architecture
        self._groups = _process_groups(tensor, pipeline, expert)
        self._config = transformer_config(architecture, base, tensor, pipeline, expert, fp8_recipe)
        self._first_stage = self._groups.pp.rank() == 0
        self._last_stage = self._groups.pp.rank() == pipeline - 1
        self._chunk_tokens = chunk_tokens
        model = build_model(
            architecture,
            self._config,
            self._groups,
            pre_process=self._first_stage,
            post_process=self._last_stage,
            padded_vocab_size=padded_vocab_size(architecture, tensor),
        )
        model = model.to(self._config.params_dtype).requires_grad_(False).eval()
        load_weights(model, architecture, self._groups)
        self.model = model.to(current().device)
        self.hosted = HostedWeights(self.model) if offload else None
        self._keeps_hidden = keeps_hidden
        self._kept: dict[int, tuple[torch.Tensor, OutputHead]] = {}
        self.forwards = 0

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that score different rows."""
        return self._groups.dp.size()

    @torch.no_grad()
    def score(
        self, rows: PackedRows, temperature: float, with_ranks: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of all response tokens, on every rank.

        Args:
            rows: the step's packed rows, the same on every rank; their number is a multiple of
                `data_parallel_size` times the rows of a microbatch.
            with_ranks: also each token's place in the model's order of preference.

        Returns:
            float32 [T] in nats and, if asked for, int64 [T] from 1 on, both on the host.

        Raises:
            Alarm: it is the first time, and a layer that should multiply in FP8 did not.
        """
        self.forwards += 1
        self._kept.clear()
        share = rows.rows // self.data_parallel_size
        start = share * self._groups.dp.rank()
        parts = microbatches(rows, start, start + share, self._groups.cp)
        schedule = get_forward_backward_func(self._groups.pp.size(), None)
        outputs = schedule(
            forward_step_func=self._forward_step(temperature, with_ranks),
            data_iterator=parts,
            model=self.model,
            num_microbatches=share // rows.microbatch_rows,
            **schedule_shape(rows),
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(self._groups.pp, self._config),
            pg_collection=self._groups,
        )
        if self._config.fp8 and self.forwards == 1:
            prove_fp8(self.model)
        # Ranks that hold no result add zeros: one all-reduce. float32 holds every rank up to 2^24 exactly.
        found_KT = torch.zeros(1 + with_ranks, rows.offsets_R1[-1], dtype=torch.float32, device=current().device)
        if self._last_stage and self._groups.tp.rank() == 0:
            for index_T, part_KT in outputs:
                found_KT[:, index_T] = part_KT
        dist.all_reduce(found_KT)
        found_KT = found_KT.cpu()
        return found_KT[0], found_KT[1].long() if with_ranks else None

    def head(self, batch: Microbatch) -> tuple[torch.Tensor, OutputHead]:
        """Hidden states and output layer of a microbatch that was scored last, on the ranks of the last stage."""
        return self._kept[batch.first_row]

    def _forward_step(self, temperature: float, with_ranks: bool) -> Any:
        def scores(hidden_states: Any, output_layer: Any, output_weight: Any, context: Microbatch, **_: Any) -> Any:
            head = output_head(
                output_layer,
                output_weight,
                self._architecture.vocab_size,
                self._groups.tp,
                temperature,
                self._chunk_tokens,
            )
            hidden_TH = response_hidden(hidden_states, self._config, self._groups.tp, context)
            if self._keeps_hidden:
                self._kept[context.first_row] = hidden_TH, head
            if with_ranks:
                logprobs_T, ranks_T = target_ranks(hidden_TH, head, context.targets_T)
                return torch.stack([logprobs_T, ranks_T.to(logprobs_T.dtype)])
            return target_logprobs(hidden_TH, head, context.targets_T)[0][None]

        def forward_step(data_iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Any]:
            batch = next(data_iterator)
            output = forward(model, batch, scores, batch)
            return output, lambda output, non_loss_data: (batch.index_T, output)

        return forward_step


def _process_groups(tensor: int, pipeline: int, expert: int) -> ProcessGroupCollection:
    """The training groups where the layout is theirs, else groups of its own over all ranks.

    Rows are split over as many context-parallel ranks as in training, since they are packed for that.
    """
    training = (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_expert_model_parallel_world_size(),
    )
    if (tensor, pipeline, expert) == training:
        return ProcessGroupCollection.use_mpu_process_groups()
    return build_inference_pg_collection(
        dist.get_world_size(), tp_size=tensor, pp_size=pipeline, ep_size=expert, expt_tp_size=tensor
    )
