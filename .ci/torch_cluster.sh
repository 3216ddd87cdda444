#!/usr/bin/env bash
# Runs the tests of the neighbour graph with torch-cluster: .ci/torch_cluster.sh PYTHON
#
# PYTHON is that of an environment in which gpurho and its test requirements are installed. torch-cluster has no
# wheels for current PyTorch, so it is compiled from source: about 11 minutes the first time, then taken from
# ${XDG_CACHE_HOME:-$HOME/.cache}/gpurho/wheels, where a wheel stands under what it was compiled for.
set -euo pipefail

version=1.6.3
python=${1:?usage: .ci/torch_cluster.sh PYTHON}
# A path is meant from where the script was called; a bare name is looked up.
python=$(command -v "$python") || { echo "no such python: $1" >&2; exit 1; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")/.."

key=$("$python" -c 'import sys, sysconfig, torch
print(f"torch-{torch.__version__}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")')
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/gpurho/wheels/torch-cluster-$version/$key

if ! compgen -G "$wheels/*.whl" > /dev/null; then
    echo "compiling torch-cluster $version for $key (about 11 minutes)"
    mkdir -p "$wheels"
    build=$(mktemp -d "$wheels/build.XXXXXX")
    trap 'rm -rf "$build"' EXIT
    # Without build isolation, because it is compiled against the torch that is installed; without pip's cache,
    # which would give back a wheel compiled against another one.
    "$python" -m pip install --quiet 'setuptools>=77' wheel
    "$python" -m pip wheel --quiet --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$build" \
        "torch-cluster==$version"
    # The move is atomic: an interrupted build leaves no half a wheel behind.
    mv "$build"/*.whl "$wheels/"
fi

"$python" -m pip install --quiet --no-deps --force-reinstall "$wheels"/torch_cluster-*.whl
# The variable turns "not installed" from a skip into a failure.
GPURHO_REQUIRE_PROVIDER=torch-cluster "$python" -m pytest tests/test_neighbors.py tests/test_radius_graph.py
