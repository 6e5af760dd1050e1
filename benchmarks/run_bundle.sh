#!/usr/bin/env bash
# Runs benchmarks/gpu.py with the wheels beside this file, which `make gpu-bundle` puts into gpu-bundle/ of a checkout.
# PYTHON is the interpreter that has torch (python3); results go to $OUT, or to outputs/gpu/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$@"; }
install "$here"/*.whl
# Without it only what sums runs up is lost: no reason to measure nothing.
"$python" -c 'import scipy' 2> /dev/null || install "$here"/binary/*.whl || echo "no scipy: parts that end in a summary fail" >&2
PYTHONPATH="$here/../src:$site" PYTHONUNBUFFERED=1 "$python" "$here/../benchmarks/gpu.py" "$@"
