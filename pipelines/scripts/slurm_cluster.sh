#!/bin/bash
# Predict a density on all GPUs of a Slurm allocation: one worker for each GPU, a scheduler on the first node.
#
#   sbatch --nodes=4 --gpus-per-node=4 slurm_cluster.sh al.xyz --out rho.h5
#
# What follows the script's name goes to `gpurho predict`. The output must lie on a file system that all nodes see.
# A job that ran out of time is submitted again with the same arguments: it goes on from the tiles that are done.
# With GPURHO_WORKER=cpu one worker process takes all the cores of a node instead of one for each GPU.
#SBATCH --job-name=gpurho
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=02:00:00
set -euo pipefail

work=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/.gpurho-cluster.XXXXXX")
file="$work/scheduler.json"
pids=()
# shellcheck disable=SC2317  # called by the trap
finish() {
    kill "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM INT

# Name the fast network where there is one: GPURHO_INTERFACE=ib0.
network=()
if [ -n "${GPURHO_INTERFACE:-}" ]; then network=(--interface "$GPURHO_INTERFACE"); fi

dask scheduler --no-dashboard --scheduler-file "$file" "${network[@]}" &
pids+=($!)
for _ in $(seq 120); do
    if [ -s "$file" ]; then break; fi
    sleep 1
done
[ -s "$file" ] || { echo "the scheduler did not start" >&2; exit 1; }

local="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
if [ "${GPURHO_WORKER:-gpu}" = cpu ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_ON_NODE:-1}}"
    export NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-$OMP_NUM_THREADS}"
    worker=(dask worker --nworkers 1 --nthreads 1 --no-dashboard --memory-limit 0)
else
    worker=(dask cuda worker --nthreads 1 --no-dashboard --memory-limit 0 --device-memory-limit 0)
fi
srun --ntasks-per-node=1 "${worker[@]}" --scheduler-file "$file" --local-directory "$local" "${network[@]}" &
pids+=($!)

gpurho predict "$@" --scheduler-file "$file"
