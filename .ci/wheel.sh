#!/usr/bin/env bash
# Build a wheel with the python given, install it into a new environment, and use it from another folder.
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source
"$python" -m build --quiet --wheel --outdir "$work/dist" "$work/source"
"$python" -m venv --system-site-packages "$work/venv"
# The dependencies are those of the environment that built it; its editable install must not be seen.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$work/site"
for entry in "$site"/*; do
    case "$(basename "$entry")" in
        *gpurho*) ;;
        *) ln -s "$entry" "$work/site/" ;;
    esac
done
"$work/venv/bin/python" -m pip install --quiet --no-deps --no-index "$work"/dist/*.whl
cd "$work"
export PYTHONPATH="$work/site" NUMBA_CACHE_DIR="$work/numba"
"$work/venv/bin/python" - <<'PY'
import gpurho, gpurho.kernels, gpurho.pipelines, pathlib, sys
assert "source" not in str(pathlib.Path(gpurho.__file__)), gpurho.__file__
assert pathlib.Path(gpurho.kernels.__file__).parent.parent == pathlib.Path(gpurho.__file__).parent
from ase.build import bulk
rho = gpurho.predict(bulk("Al", "fcc", 4.05), spacing=0.5, progress=False)
assert abs(rho.electrons - 3.0) < 0.2, rho.electrons
print(f"wheel: {gpurho.__version__} predicts {rho.electrons:.4f} electrons for one Al atom")
PY
"$work/venv/bin/gpurho" models
