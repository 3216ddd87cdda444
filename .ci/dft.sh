#!/usr/bin/env bash
# The DFT engines: .ci/dft.sh PYTHON installs gpurho[dft] there, and on Debian, as root, what it needs from Debian.
# Without root, or elsewhere, install libxc, OpenBLAS (with headers) and Quantum ESPRESSO by hand first.
set -euo pipefail
python=${1:?usage: .ci/dft.sh PYTHON}
# A path is meant from where the script was called; a bare name is looked up.
python=$(command -v "$python") || { echo "no such python: $1" >&2; exit 1; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")/.."
.ci/debian.sh libxc-dev libopenblas-dev quantum-espresso
[[ -e ~/.gpaw/siteconfig.py ]] || export GPAW_CONFIG="${GPAW_CONFIG:-$PWD/.ci/gpaw_siteconfig.py}"
"$python" -m pip install --quiet --constraint constraints.txt --editable ".[test,dask,dft]"
