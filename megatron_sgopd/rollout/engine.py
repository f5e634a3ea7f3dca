"""vLLM inside the training processes: generation with the student's current weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_sgopd.config import RolloutSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.weight_map import Parameter, owned_parameters
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Decoding, Trajectory, gather_trajectories, sampling_seed
from megatron_sgopd.rollout.unregistered import unregistered_tensors

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def replicas(ranks: int, tensor_parallel: int, setting: str = "rollout.tensor_parallel") -> int:
    """Replicas that `ranks` ranks form.

    Args:
        setting: where `tensor_parallel` comes from.

    Raises:
        ConfigError: they do not divide.
    """
    if ranks % tensor_parallel:
        raise ConfigError(
            f"{setting}={tensor_parallel} does not divide the number of ranks, which is {ranks}: start "
            f"{tensor_parallel} or a multiple (sbatch --ntasks-per-node, torchrun --nproc-per-node), or change it"
        )
    return ranks // tensor_parallel


class RolloutEngine:
    """One vLLM replica for every `tensor_parallel` consecutive ranks, on the ranks' own devices.

    All ranks call every method together, but replicas know nothing of each other: one that has fewer or shorter
    responses generates no empty steps beside the others. Log-probs that an engine reports are those of the
    distribution that was sampled from: after the temperature, over the whole vocabulary.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: RolloutSettings,
        max_tokens: int,
        seed: int,
        quantization: str | None = None,
    ) -> None:
        """Load the model in `folder` (Hugging Face format); prompt and response share `max_tokens`.

        Args:
            quantization: `per_tensor` or `per_block`, FP8 weights; those that it is given stay BF16.
        """
        from vllm import LLM

        world_size = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._replicas = replicas(world_size, settings.tensor_parallel)
        self._replica = rank // settings.tensor_parallel
        self._contributes = rank % settings.tensor_parallel == 0
        self._max_new_tokens = settings.max_new_tokens
        self.weight_version = 0
        self.tensor_parallel = settings.tensor_parallel
        self.quantized = quantization is not None
        self._llm = LLM(
            model=str(folder),
            tensor_parallel_size=settings.tensor_parallel,
            # With data_parallel_size vLLM would keep replicas in step by collectives, whose sizes do not pair up once
            # one of them ends a step earlier under asynchronous scheduling. Without, each is a group of its own.
            distributed_executor_backend="external_launcher",
            max_model_len=max_tokens,
            logprobs_mode="processed_logprobs",
            trust_remote_code=False,
            seed=seed & 0x7FFFFFFF,
            **current().engine_options(settings.memory_fraction, int(settings.cache_gib * 2**30), quantization),
        )
        self._fresh = {name: tensor.cpu().clone() for name, tensor in self._unregistered().items()}

    def generate(
        self, prompts: Sequence[Prompt], samples: Sequence[int], decoding: Decoding, run_seed: int, step: int
    ) -> list[Trajectory]:
        """Sample as many responses for each prompt as `samples` says; every rank gets all of them, in order."""
        from vllm import SamplingParams, TokensPrompt

        mine = list(zip(prompts, samples, strict=True))[self._replica :: self._replicas]
        requests = [(prompt, sample) for prompt, count in mine for sample in range(count)]
        texts = [TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt, _ in requests]
        parameters = [
            SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                stop=list(decoding.stop),
                max_tokens=self._max_new_tokens,
                logprobs=0,
                flat_logprobs=True,
                detokenize=bool(decoding.stop),  # which are looked for in the text
                seed=sampling_seed(run_seed, step, prompt.id, sample),
            )
            for prompt, sample in requests
        ]
        with current().plain_torch():
            outputs = self._llm.generate(texts, parameters, use_tqdm=False)
        local = []
        for (prompt, sample), output in zip(requests, outputs, strict=True):
            (completion,) = output.outputs
            local.append(
                Trajectory(
                    prompt,
                    sample,
                    tuple(completion.token_ids),
                    tuple(completion.logprobs.logprobs),
                    truncated=completion.finish_reason == "length",
                )
            )
        return gather_trajectories(local, prompts, self._contributes)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace the engine's weights by full tensors under their Hugging Face names."""
        current().load_engine_weights(self._llm, weights)
        self.weights_changed()

    def parameters(self, architecture: Architecture) -> dict[Parameter, torch.Tensor]:
        """This rank's own tensor for each parameter of a model without experts, to be written to in place.

        vLLM puts the pieces of a parameter one after the other, under a name of its own.
        """
        [(tensors, fused)] = self._llm.apply_model(
            lambda model: (dict(model.named_parameters()), model.packed_modules_mapping)
        )
        found = {}
        for parameter in owned_parameters(architecture):
            name, modules = parameter.pieces[0].name, [piece.name.split(".")[-2] for piece in parameter.pieces]
            if len(modules) > 1:
                [whole] = [whole for whole, parts in fused.items() if parts == modules]
                name = name.replace(modules[0], whole)
            found[parameter] = tensors[name].detach()
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, before they are quantized."""
        return self._model_config.dtype

    def _unregistered(self) -> dict[str, torch.Tensor]:
        [found] = self._llm.apply_model(lambda model: unregistered_tensors(model, current().device))
        return found

    def lost_tensors(self) -> list[str]:
        """Names of the model's tensors beside its weights and buffers that are not as vLLM had made them.

        vLLM's sleep drops them as it does the weights, but no sync sends them, and no digest covers them.
        """
        now = self._unregistered()
        return [name for name, fresh in self._fresh.items() if name not in now or not now[name].cpu().equal(fresh)]

    def weights_changed(self) -> None:
        """To be told when parameters were written to: nothing that was computed with the old ones is used again."""
        emptied = self._llm.reset_prefix_cache()
        assert emptied, "a request is still running"
        self.weight_version += 1

    def fetch(self, part: str) -> None:
        """Take memory for the `weights` before a sync, or for the `kv_cache` before generating."""
        if self._sleeps:
            self._llm.wake_up(tags=[part])

    def ready(self) -> None:
        """Nothing: vLLM wakes up before it returns."""

    def release(self) -> None:
        """Give the device's memory to training, if there is a sleep mode; the next use begins with a sync."""
        if self._sleeps:
            self._llm.sleep(level=2)

    @property
    def _sleeps(self) -> bool:
        return self._model_config.enable_sleep_mode

    @property
    def _model_config(self) -> ModelConfig:
        return self._llm.llm_engine.vllm_config.model_config

    def close(self) -> None:
        """Release the engine's memory; the process may build another engine afterwards."""
        # vLLM's shutdown, which is also its finalizer, would destroy the default process group: Megatron's.
        self._llm.llm_engine.engine_core._finalizer.detach()
        del self._llm
        gc.unfreeze()  # vLLM froze what it had built
        gc.collect()
