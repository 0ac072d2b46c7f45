#!/usr/bin/env bash
# Train one KV-shifting layer on the induction task of examples/induction (about a minute on two
# CPU cores) and save a Megatron checkpoint. Usage: train.sh DIRECTORY
set -euo pipefail

save=$(realpath -m "${1:?DIRECTORY for the checkpoint is missing}")
cd "$(dirname "$0")/../.."
. .venv/bin/activate

export CUDA_VISIBLE_DEVICES=  # the model is tiny, and two ranks cannot share one GPU
export OMP_NUM_THREADS=1

model=(--num-layers 1 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 100000
    --hidden-dropout 0 --attention-dropout 0)
data=(--task-module examples.induction.task --tokenizer-type NullTokenizer --vocab-size 512
    --make-vocab-size-divisible-by 1 --seq-length 64 --max-position-embeddings 64 --num-workers 0
    --no-create-attention-mask-in-dataloader)
training=(--micro-batch-size 32 --global-batch-size 32 --train-iters 400 --lr 3e-3 --min-lr 3e-4
    --lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed 1
    --eval-interval 100 --eval-iters 16 --log-interval 25)

torchrun --standalone --nproc-per-node 2 -m kvshift_megatron.pretrain \
    --tensor-model-parallel-size 2 --sequence-parallel \
    "${model[@]}" "${data[@]}" "${training[@]}" --save "$save" --save-interval 400
