#!/bin/bash
# Train on several machines under SLURM, one torchrun on each. A run that is not done at the time limit of its job saves
# and goes on in the next one. Copy this file and adapt the lines of #SBATCH. The arguments are those of engine.train:
#
#     sbatch --nodes 4 slurm.sh my_recipe.toml --run.folder /shared/runs/one
#
# Every node needs the same software, recipe, data and pretrained checkpoint; run.folder is on a file system that all of
# them share. Variables: NPROC, the ranks on each node (its GPUs); MAX_RESTARTS (3) of torchrun; PORT.
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# USR1 to this script 180 seconds before the time limit, in which a step has to end and last/ to be saved.
#SBATCH --signal=B:USR1@180

set -u
# torchrun's rendezvous is on the first node. If that node dies, the job ends, and SLURM queues it again.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
endpoint=$first:${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150 # seconds that torchrun gives its ranks to save

is_stopping=0
# shellcheck disable=SC2329
stop() {
    is_stopping=1
    scancel --signal=TERM "$SLURM_JOB_ID" # to torchrun, which passes it on to the ranks; not to this script
}
trap stop USR1

# Each node has a name of its own in SLURMD_NODENAME, so that its shell has to read it.
# shellcheck disable=SC2016
srun sh -c 'exec torchrun --local-addr "$SLURMD_NODENAME" "$@"' launch \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${NPROC:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts "${MAX_RESTARTS:-3}" -m engine.train "$@" --run.resume auto &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal has ended `wait`, not the step
    wait "$step"
    code=$?
done
if [ "$is_stopping" = 1 ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
