#!/bin/bash
# Predict a density on the GPUs of several machines that ssh reaches without a password and that share a folder.
#
#   HOSTS="node1 node2" ./ssh_cluster.sh al.xyz --out /shared/rho.h5
#
# What follows the script's name goes to `gpurho predict`. The scheduler runs here; all machines need the same gpurho,
# at the same path, and see the current folder. GPURHO_WORKER=cpu: one worker process for each machine, without GPUs.
# The same command again goes on from the tiles that are done.
set -euo pipefail

: "${HOSTS:?give the machines, e.g. HOSTS=\"node1 node2\"}"
work=$(mktemp -d "$PWD/.gpurho-cluster.XXXXXX")
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

network=()
if [ -n "${GPURHO_INTERFACE:-}" ]; then network=(--interface "$GPURHO_INTERFACE"); fi
bin=$(dirname "$(command -v dask)")

"$bin/dask" scheduler --no-dashboard --scheduler-file "$file" "${network[@]}" &
pids+=($!)
for _ in $(seq 120); do
    if [ -s "$file" ]; then break; fi
    sleep 1
done
[ -s "$file" ] || { echo "the scheduler did not start" >&2; exit 1; }

if [ "${GPURHO_WORKER:-gpu}" = cpu ]; then
    worker="dask worker --nworkers 1 --nthreads 1 --memory-limit 0"
else
    worker="dask cuda worker --nthreads 1 --memory-limit 0 --device-memory-limit 0"
fi
for host in $HOSTS; do
    # -tt: the workers end when this end of the connection does.
    ssh -tt -o BatchMode=yes "$host" \
        "cd '$PWD' && env OMP_NUM_THREADS='${OMP_NUM_THREADS:-1}' '$bin/'$worker --no-dashboard" \
        "--scheduler-file '$file' --local-directory /tmp ${network[*]}" </dev/null &
    pids+=($!)
done

"$bin/gpurho" predict "$@" --scheduler-file "$file"
