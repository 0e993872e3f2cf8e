#!/usr/bin/env bash
# A training on Slurm that goes on after the time limit or a preemption, until it is done. From the checkout:
#   sbatch examples/slurm/train.sh language configs/language/llama3_8b/lora.yaml [--trainer.max_epochs=3 ...]
# With several tasks a node, or several nodes, also give --trainer.strategy=ddp.
#SBATCH --job-name=lit-adapters
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300  # to the tasks, five minutes before the end: time for a batch and a checkpoint
set -uo pipefail
program=$1 recipe=$2
shift 2
# Every attempt has the same version, and so the same folder, in which `last` finds the newest checkpoint.
srun python -m "$program" fit --config "$recipe" --ckpt_path last \
    --trainer.logger.init_args.version "slurm-$SLURM_JOB_ID" \
    --trainer.num_nodes "${SLURM_JOB_NUM_NODES:-1}" --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" "$@"
status=$?
if [ "$status" -eq 143 ]; then # stopped by SIGTERM, with a checkpoint
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
