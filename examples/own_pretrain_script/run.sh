#!/usr/bin/env bash
# bash examples/own_pretrain_script/run.sh      (RUN_DIR=… chooses the run folder)
# Two steps of SG-OPD from a plain Megatron script on this machine's CPU. Flags that only the CPU needs are added by the plugin.
set -euo pipefail
models=examples/arithmetic_cpu/models

torchrun --standalone --nproc-per-node 2 examples/own_pretrain_script/pretrain_gpt.py \
    --tensor-model-parallel-size 2 \
    --num-layers 4 --hidden-size 96 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 32 \
    --group-query-attention --num-query-groups 2 \
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --qk-layernorm \
    --position-embedding-type rope --rotary-base 10000 --max-position-embeddings 2048 \
    --hidden-dropout 0 --attention-dropout 0 \
    --tokenizer-type NullTokenizer --vocab-size 264 --mock-data \
    --seq-length 128 --micro-batch-size 2 --global-batch-size 16 --calculate-per-token-loss \
    --train-iters 2 --lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0 --eval-interval 100 \
    --sgopd-model-path=$models/student \
    --sgopd-teacher-path=$models/teacher \
    --sgopd-data-train-source=reasoning_gym:chain_sum \
    --sgopd-data-train-size=100 \
    --sgopd-rollout-prompts-per-step=4 \
    --sgopd-rollout-group-size=4 \
    --sgopd-rollout-max-new-tokens=48 \
    --sgopd-rollout-cache-gib=0.1 \
    --sgopd-verify-verifier=task \
    --sgopd-run-dir="${RUN_DIR:-runs/own_pretrain_script}"
