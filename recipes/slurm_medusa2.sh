#!/bin/bash
# Medusa-2 on Vicuna-7B over several nodes of GPUs, one process a GPU; see docs/launch.md.
#
#     sbatch recipes/slurm_medusa2.sh
#
# Submit it from the repository, on a file system that all nodes share. Adapt nodes, GPUs, time
# and, where your cluster asks for them, --partition and --account.

#SBATCH --job-name=medusa2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8             # whole nodes; see docs/launch.md before --gpus-per-task
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300        # to the steps, five minutes before the time is up: save, stop
#SBATCH --requeue                # after a preemption or the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
workdir=${WORKDIR:-runs/vicuna7b_medusa2}
source .venv/bin/activate

latest() { ls "$workdir/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1; }

before=$(latest)
srun --kill-on-bad-exit=1 --label \
    python train.py --config configs/vicuna7b_medusa2.py --workdir "$workdir" "$@"
code=$?

# Stopped with something new to show, as by the signal: go on in another allocation. A run that
# fails without having got further would fail again.
if [ "$code" -ne 0 ] && [ "$(latest)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
