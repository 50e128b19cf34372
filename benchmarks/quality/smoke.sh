#!/usr/bin/env bash
# The quality benchmark in small, for two CPU cores (README.md says how long): are its runs those of the product, and do
# tuning, freezing and confirming still give the committed order?  SORA_TEST_DATA: the folder of data/ and models/.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python benchmarks/quality/same_as_train.py --steps 10
python benchmarks/quality/smoke.py --workers 2 "$@"
