#!/bin/bash
# Trains on several machines under SLURM: one task for each GPU, started by srun. No hostfile, no ssh, no launcher between srun and the tasks.
#
#   sbatch --nodes=8 --gpus-per-node=8 --ntasks-per-node=8 tools/launch/slurm.sh -d configs 125M.yml my_setup.yml
#
# What follows the script's name is for train.py. Start sbatch in the folder of deepy.py. docs/launching.md explains each step.
#SBATCH --job-name=neox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to the tasks five minutes before the time is over: the run finishes its step, saves and stops.
#SBATCH --signal=TERM@300

set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "slurm.sh: name the configuration files, such as: sbatch tools/launch/slurm.sh -d configs 125M.yml my_setup.yml" >&2
    exit 2
fi

# The Python of the virtual environment that lies beside deepy.py, or the one that NEOX_PYTHON names. All machines have to see it.
PYTHON="${NEOX_PYTHON:-.venv/bin/python}"
# The processes meet on the first machine. The port depends on the job, so that two jobs on one machine do not meet.
HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${HOSTS%%$'\n'*}"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT
# The tasks of a machine share its cores.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi

# RANK, WORLD_SIZE and LOCAL_RANK: train.py reads them from srun's variables. A task that fails takes the others down.
exec srun --kill-on-bad-exit=1 --label "$PYTHON" -u train.py "$@"
