#!/bin/bash
# Four workers of the module "jobs" as an array of Slurm jobs: sbatch --export=ALL,NATS_URL=nats://… slurm-worker.sh
# Submit it in the folder of the module. Each worker stops before its time limit, and its tasks go to other workers.
#SBATCH --job-name=nqnb-worker
#SBATCH --array=1-4
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --output=nqnb-worker-%A_%a.log
# SIGTERM to the batch shell 60 s before the limit (Slurm may send it up to 60 s earlier). This must be more than the worker's
# shutdown_timeout (10 s) and the time to stop (15 s). To stop a worker by hand: scancel --batch --signal=TERM JOB
#SBATCH --signal=B:TERM@60
set -euo pipefail
: "${NATS_URL:?NATS_URL is not set. Pass it with sbatch --export=ALL,NATS_URL=nats://…}"

# The folder of the virtual environment that has nqnb.
PATH="${NQNB_VENV:-$PWD/.venv}/bin:$PATH"

# exec makes the worker the batch shell, so that the worker receives the signal.
exec nqnb worker jobs:worker --concurrency "${SLURM_CPUS_PER_TASK:-1}" --log-format json
