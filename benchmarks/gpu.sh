#!/usr/bin/env bash
# What to run on a GPU machine, and where its results go.
#
#   bash benchmarks/gpu.sh [FOLDER]                     (default: outputs/gpu)
#   SORA_GPU_REHEARSAL=1 bash benchmarks/gpu.sh         the same on a CPU with a toy model: proves the script
#
# 1. the tests that need a CUDA device   2. step.py on a LLaMA-7B shape of random NF4 weights: time, tokens/s, peak
# memory, what adapters cost above the frozen backbone and beside PEFT   3. ZeRO-2 and ZeRO-3 over all GPUs, or in one
# process.
#
# It goes on where a part fails, says so, and ends with 1 then.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
folder=${1:-outputs/gpu}
mkdir -p "$folder"
failed=0

part() { # name, command…: its output on the terminal and in FOLDER/name.txt
  local name=$1
  shift
  echo "== $name: $*"
  if ! "$@" 2>&1 | tee "$folder/$name.txt"; then
    echo "== $name FAILED"
    failed=1
  fi
}

if [ -n "${SORA_GPU_REHEARSAL:-}" ]; then
  export CUDA_VISIBLE_DEVICES=
  gpus=0
  device=cpu shape=(--shape tiny --rounds 1 --warm-up 1)
  tokens=64
else
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 1
  if [ "$gpus" = 0 ]; then
    echo "this machine has no CUDA device; SORA_GPU_REHEARSAL=1 tries the script itself on a CPU" >&2
    exit 2
  fi
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$folder/hardware.txt"
  device=cuda shape=(--shape 7b)
  tokens=2048
fi

gpu_tests() { # 5: there are none
  python -m pytest -q -m gpu tests
  local code=$?
  [ "$code" = 5 ] && { echo "no test is marked gpu yet"; return 0; }
  return "$code"
}
part tests gpu_tests
common=(--device "$device" "${shape[@]}" --tokens "$tokens" --checkpointing on --out "$folder/step.jsonl")
part step python benchmarks/step.py "${common[@]}" --backbones nf4 --ranks 8,64
part step_bf16 python benchmarks/step.py "${common[@]}" --backbones bf16 --ranks 64 --arms peft,peft_bf16,ours,cut

processes=$((gpus > 1 ? gpus : 1))
for strategy in zero2 zero3; do
  part "$strategy" torchrun --standalone --nproc_per_node "$processes" benchmarks/zero.py "$strategy" "${shape[@]}" \
    --tokens "$tokens"
done
exit "$failed"
