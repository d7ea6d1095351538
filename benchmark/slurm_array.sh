#!/usr/bin/env bash
# SLURM array: one element per run, per --workers of them, or with --share-offline per offline phase
# and the runs that start from it. `launch.py --slurm FILE` fills the words between @ signs; edit
# this template (or the file written) to fit your cluster: partition, account, hours, GPU type.
#
# An element that finds its run finished ends at once; one that was stopped continues from its
# checkpoint. So the way to go on after a time limit or a crash is to submit the same file again.
#SBATCH --job-name=cleanflow
#SBATCH --array=0-@LAST@
#SBATCH --output=@OUT@/slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --cpus-per-task=@CPUS@
#SBATCH --mem=@MEMORY@
#SBATCH --gpus=@GPUS@
#SBATCH --requeue
# two minutes before the end the batch shell, which exec replaces by the launcher, gets SIGTERM:
# the run finishes its dispatch and writes a checkpoint
#SBATCH --signal=B:TERM@120

set -euo pipefail
cd @DIRECTORY@
exec @PYTHON@ @LAUNCHER@ --index "$SLURM_ARRAY_TASK_ID" --workers @WORKERS@ @ARGUMENTS@
