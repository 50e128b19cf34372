#!/usr/bin/env bash
# The main job with built-in inputs: no hub, no GPU, about five minutes on two cores, including installation.
#
#   bash launch/demo.sh [section.key=value ...]
#
# .venv → a small base model and question–answer data from Python's own documentation → two processes, ZeRO-2, NF4
# backbone, proximal gates → consensus → export → self-check → three lines that load the adapter.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install_into_venv .
export CUDA_VISIBLE_DEVICES=  # two processes on the CPU, even if there is a GPU

echo "base model and data (once, about a minute; outputs/demo)"
warm_deepspeed &
warming=$!
python launch/demo_base.py --out outputs/demo
wait "$warming"

accelerate launch --config_file launch/cpu.yaml -m sora_llm.train configs/demo.yaml "$@"

run=outputs/demo/run
for override in "$@"; do
  case $override in output.output_dir=*) run=${override#output.output_dir=} ;; esac
done
python launch/demo_summary.py "$run"
