#!/usr/bin/env bash
# Run torchrun with the ranks of this node. pretrain.sbatch has srun start this on every node.
set -uo pipefail
: "${RANKS_PER_NODE:?}" "${HEAD:?}" "${PORT:?}" "${ATTEMPT:?}" "${PYTHON:?}"

options=(
    --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE"
    --node-rank="$SLURM_NODEID"  # ranks follow Slurm's order of the nodes, which follows the network
    --rdzv-backend=static --master-addr="$HEAD" --master-port="$PORT"
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT  # without SIGTERM: see below
    --max-restarts=0  # Slurm restarts the job instead
    --log-dir="$ATTEMPT/logs/node-$SLURM_NODEID" --redirects=3
)
# The first rank, and the last, which prints the losses, also write to the job's output.
last=$((RANKS_PER_NODE - 1)) last_node=$((SLURM_STEP_NUM_NODES - 1))
shown=
if [ "$SLURM_NODEID" = 0 ]; then shown=0:3; fi
if [ "$SLURM_NODEID" = "$last_node" ]; then shown=${shown:+$shown,}$last:3; fi

# Some clusters announce preemption with a grace time only by SIGTERM to every process of a step.
# torchrun would end the ranks, and a save needs helper processes that would not survive. So all that
# is started here ignores SIGTERM, and this shell asks the ranks to save instead. (PyTorch's data
# loading workers die of it nevertheless: such clusters need --num-workers 0.)
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

# `wait` also returns when a signal arrives.
while kill -0 $torchrun 2>/dev/null; do wait $torchrun; done
wait $torchrun
