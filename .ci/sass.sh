#!/usr/bin/env bash
# CUDA without a GPU: compiles every kernel to machine code for sm_80 and sm_90 with CUDA 13 and for sm_70, sm_80 and
# sm_90 with CUDA 12 (CUDA 13 dropped the V100), and runs the drivers under the simulator of numba-cuda.
#
# The two tool chains lie in environments under ${XDG_CACHE_HOME:-$HOME/.cache}/gpurho/sass, made once (about 2 minutes
# and 1.5 GB) and made anew when the list of packages below changes. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gpurho/sass
# What the kernels and the simulator's cases import, and no more: torch is not among it.
packages=(numba==0.68.1 numba-cuda==0.30.4 "numpy==2.4.*" scipy ase pytest hypothesis)

environment() { # NAME TOOLCHAIN...: the environment's python
    local name=$1; shift
    local key folder
    key=$(printf '%s\n' "$("$python" -VV)" "${packages[@]}" "$@" | sha256sum | cut -c1-12)
    folder=$cache/$name-$key
    if [[ ! -e $folder/.complete ]]; then
        rm -rf "$folder"
        mkdir -p "$cache"
        "$python" -m venv "$folder" >&2
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" "$@" >&2
        touch "$folder/.complete"
    fi
    # The checkout itself, each time: it may lie elsewhere than the last one.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable . >&2
    echo "$folder/bin/python"
}

cuda13=$(environment cuda13 "numba-cuda[cu13]==0.30.4" "cuda-toolkit[nvcc,nvrtc,nvjitlink,cudart,nvvm]==13.0.*")
"$cuda13" benchmarks/sass_check.py --arch 80 90
"$cuda13" -m pytest -q tests/test_cuda_simulator.py

cuda12=$(environment cuda12 "numba-cuda[cu12]==0.30.4" "cuda-toolkit[nvcc,nvrtc,nvjitlink,cudart]==12.9.*")
"$cuda12" benchmarks/sass_check.py --arch 70 80 90
