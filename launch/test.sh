#!/usr/bin/env bash
# Lint, type check and tests, installing first where needed.  Extra arguments go to pytest:
#
#   bash launch/test.sh                    what CI runs
#   bash launch/test.sh -n 2 --dist loadfile -m matrix     the full strategy × phase × precision matrix, random settings
#                                          and what else is slow (an hour on two cores)
#   bash launch/test.sh -m gpu             on a machine with a GPU
#   bash launch/test.sh --only-tests ...   without lint and type check
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install_into_venv ".[dev]"

if [ "${1:-}" = --only-tests ]; then
  shift
else
  ruff check .
  ruff format --check .
  mypy
fi
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions_tests"
warm_deepspeed
# Two at a time, file by file: many tests wait for processes they start.
# A worker that dies fails its test and ends the suite: replacing it, the default, makes the suite hang at the end
# (pytest-xdist 3.8.0, https://github.com/pytest-dev/pytest-xdist/issues/1378).
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --max-worker-restart 0 --durations 15
python -m pytest "$@"
