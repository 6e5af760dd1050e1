#!/usr/bin/env bash
# Runs benchmarks/gpu.py with the wheels beside this file, which `make gpu-bundle` puts into gpu-bundle/ of a checkout.
# PYTHON is the interpreter that has torch (python3); results go to $OUT, or to outputs/gpu/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$here"/*.whl
PYTHONPATH="$here/../src:$site" PYTHONUNBUFFERED=1 "$python" "$here/../benchmarks/gpu.py" "$@"
