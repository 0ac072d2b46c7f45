#!/usr/bin/env bash
# What srun runs on every node: torchrun with the ranks of this node. Called by pretrain.sbatch.
set -uo pipefail
: "${RANKS_PER_NODE:?}" "${HEAD:?}" "${PORT:?}" "${ATTEMPT:?}" "${PYTHON:?}"

options=(
    --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE"
    --node-rank="$SLURM_NODEID"  # ranks in Slurm's order of the nodes, which follows the network's
    --rdzv-backend=static --master-addr="$HEAD" --master-port="$PORT"
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT  # without SIGTERM: see below
    --max-restarts=0  # starting again is Slurm's part
    --log-dir="$ATTEMPT/logs/node-$SLURM_NODEID" --redirects=3
)
# The first rank and the last, which prints the losses, also write to the job's output.
last=$((RANKS_PER_NODE - 1)) last_node=$((SLURM_STEP_NUM_NODES - 1))
shown=
if [ "$SLURM_NODEID" = 0 ]; then shown=0:3; fi
if [ "$SLURM_NODEID" = "$last_node" ]; then shown=${shown:+$shown,}$last:3; fi

# SIGTERM, where Slurm preempts with a grace time and says so in no other way, reaches every process
# of a step. torchrun would end the ranks, and a save needs helpers that would not survive. So what is
# started here ignores it, and this shell asks the ranks to save instead. (PyTorch's data-loading
# workers die of it nevertheless: --num-workers 0 is needed there.)
(
    trap '' TERM
    exec "$PYTHON" -m torch.distributed.run "${options[@]}" ${shown:+--tee="$shown"} \
        -m kvshift_megatron.pretrain "$@"
) &
torchrun=$!
ask_to_save() {
    local rank
    for rank in $(cat /proc/$torchrun/task/*/children 2>/dev/null); do
        kill -URG "$rank" 2>/dev/null
    done
}
trap ask_to_save TERM

# `wait` also returns when a signal came.
while kill -0 $torchrun 2>/dev/null; do wait $torchrun; done
wait $torchrun
