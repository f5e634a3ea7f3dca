"""PYTHONPATH=.trl .venv/bin/python tools/bench/trl_distillation.py STUDENT TEACHER PROMPTS [--steps 10]

Seconds of each step of TRL's DistillationTrainer on the CPU, for peers.py: prompts are drawn in the order of PROMPTS (a
JSON list of texts), each answered --group-size times; reverse KL on the student's own responses. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY_TILE = 32
"""TRL makes tiles of 32,768 logits a token whatever the vocabulary; it is faster here where they fit it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("prompts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompts-per-step", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(options.threads))
    sys.modules["vllm"] = None  # type: ignore[assignment]  # TRL imports one that it finds, and knows only older ones
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, folder)))
    return 0


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train for --steps; seconds and mean response length of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.kernels import chunked_divergence

    torch.set_num_threads(options.threads)
    chunked_divergence.VOCAB_CHUNK_SIZE = VOCABULARY_TILE
    texts = json.loads(Path(options.prompts).read_text())[: options.steps * options.prompts_per_step]
    rows = [{"prompt": text} for text in texts for _ in range(options.group_size)]  # it knows no groups
    config = DistillationConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=options.prompts_per_step * options.group_size,
        max_steps=options.steps,
        max_completion_length=options.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        generation_kwargs={"do_sample": True},
        beta=1.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    stamps: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())
            lengths.append(trainer._metrics["train"]["completions/mean_length"][-1])

    trainer = DistillationTrainer(
        model=options.student,
        teacher_model=options.teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.student, padding_side="left"),
        callbacks=[Clock()],
    )
    models = (trainer.model, trainer.teacher_model)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float32}
    trainer.train()
    return {"seconds": [end - begin for begin, end in itertools.pairwise(stamps)], "lengths": lengths}


if __name__ == "__main__":
    sys.exit(main())
