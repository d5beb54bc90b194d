#!/bin/bash
# Trains on several machines under SLURM: one task for each machine, in which torchrun starts one process for each GPU.
#
#   sbatch --nodes=8 --gpus-per-node=8 tools/launch/slurm_torchrun.sh -d configs 125M.yml my_setup.yml
#
# Use it where a task of srun may not see all GPUs of its machine. slurm.sh is simpler. docs/launching.md explains each step.
#SBATCH --job-name=neox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "slurm_torchrun.sh: name the configuration files, such as: sbatch tools/launch/slurm_torchrun.sh -d configs 125M.yml my_setup.yml" >&2
    exit 2
fi

PYTHON="${NEOX_PYTHON:-.venv/bin/python}"
HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${HOSTS%%$'\n'*}"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
# One process for each GPU of a machine. Without GPUs: NEOX_PROCESSES, or one.
PROCESSES="${NEOX_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
export PYTHON MASTER_ADDR MASTER_PORT PROCESSES

# The single quotes are meant: each task finds its own SLURM_NODEID.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 --label bash -c '
    exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$PROCESSES" \
        --max-restarts=0 --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" train.py "$@"
' torchrun "$@"
