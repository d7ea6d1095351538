#!/usr/bin/env bash
# What a GPU does with these scripts, in ten minutes -> OUT/gpu.md and gpu.json; see gpu.py.
#   bash benchmark/gpu.sh --out runs/gpu --fql ../fql
#   bash benchmark/gpu.sh --tiny                       # on any machine: does it run?
set -euo pipefail
cd "$(dirname "$0")/.."
exec python benchmark/gpu.py "$@"
