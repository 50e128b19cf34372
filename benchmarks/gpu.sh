#!/usr/bin/env bash
# What to run on a GPU machine, and where its results go.
#
#   bash benchmarks/gpu.sh [FOLDER [PART …]]            (default: outputs/gpu and all parts)
#   SORA_GPU_REHEARSAL=1 bash benchmarks/gpu.sh         the same on a CPU with a toy model: proves the script
#
#   tests                    the tests that need a CUDA device
#   head                     head_loss.py: the loss in parts against whole logits
#   kernels                  gpu_kernels.py: whether the processor or the GPU is what a step waits for
#   r16 r64                  step.py on a LLaMA-7B shape in NF4, 4 x 2,048 tokens, without recompute: time, tokens/s, peak
#                            memory, what adapters cost above the frozen backbone and beside PEFT
#   short recompute bf16     1 x 2,048 tokens; with recompute; on the unquantised backbone
#   compiled compiled_short  the same under torch.compile, 4 x and 1 x 2,048 tokens
#   liger                    with Liger's kernels in the backbone; needs liger-kernel, not one of all parts
#   run run_open             gpu_run.py: whole runs of the product, with and without recompute, memory against `estimate`
#   run_compiled             the latter with train.torch_compile
#   zero2 zero3              zero.py over all GPUs, or in one process
#
# It goes on where a part fails, says so, and ends with 1 then; what a failed run left in FOLDER/model is kept.  The part
# `tests` needs pytest, pytest-xdist and the test data, of which it makes sure before anything is run: without them tests
# would be skipped, or none found.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
folder=${1:-outputs/gpu}
shift
parts=${*:-tests head kernels r16 r64 short recompute bf16 compiled compiled_short run run_open run_compiled zero2 zero3}
if [[ " $parts " == *" tests "* ]]; then
  if ! python3 -c 'import pytest, xdist'; then
    echo "benchmarks/gpu.sh: the part tests needs pytest and pytest-xdist: pip install -e '.[dev]', or name other parts" >&2
    exit 2
  fi
  data=${SORA_TEST_DATA:-../shared}
  for needed in data/gsm8k_train.jsonl models/base5m models/stories260k; do
    if [ ! -e "$data/$needed" ]; then
      echo "benchmarks/gpu.sh: $data/$needed is missing, without which the part tests would skip its tests;" \
        "set SORA_TEST_DATA to the folder that holds data/ and models/, or name other parts" >&2
      exit 2
    fi
  done
fi
mkdir -p "$folder"
failed=0

part() { # name, command…: its output on the terminal and in FOLDER/name.txt
  local name=$1 started=$SECONDS
  shift
  echo "== $name: $*"
  if ! "$@" 2>&1 | tee "$folder/$name.txt"; then
    echo "== $name FAILED"
    failed=1
  fi
  echo "== $name: $((SECONDS - started)) s"
}

if [ -n "${SORA_GPU_REHEARSAL:-}" ]; then
  export CUDA_VISIBLE_DEVICES=
  gpus=0
  device=cpu shape=(--shape tiny) rounds=(--rounds 1 --warm-up 1)
  tokens=64
  small=(data.sequence_len=512)
  head=(--rounds 1 --tokens 64 --hidden 64 --words 500)
else
  gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())') || exit 1
  if [ "$gpus" = 0 ]; then
    echo "this machine has no CUDA device; SORA_GPU_REHEARSAL=1 tries the script itself on a CPU" >&2
    exit 2
  fi
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$folder/hardware.txt"
  device=cuda shape=(--shape 7b) rounds=(--rounds 5)
  tokens=2048
  small=()
  head=(--rounds 9 --tokens 2048,8192 --hidden 4096 --words 32000,128256 --dtypes bf16)
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
step=(python3 benchmarks/step.py --device "$device" "${shape[@]}" "${rounds[@]}" --tokens "$tokens")
step+=(--out "$folder/step.jsonl")
compiled=floor_compiled,peft_bf16_compiled,ours_compiled
processes=$((gpus > 1 ? gpus : 1))

run=(python3 benchmarks/gpu_run.py "${shape[@]}" --folder "$folder/model")
open=(train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2 train.gradient_checkpointing=false)

for name in $parts; do
  case $name in
    tests)
      if [ "$gpus" = 0 ]; then # where all would be skipped
        part tests python3 -m pytest -q -m gpu -n 12 --collect-only tests/test_gpu.py
      else
        part tests python3 -m pytest -q -m gpu -n 12 tests/test_gpu.py
      fi
      ;;
    head) part head python3 benchmarks/head_loss.py --device "$device" "${head[@]}" ;;
    r16) part r16 "${step[@]}" --rows 4 --backbones nf4 --ranks 16 --arms peft,peft_bf16,ours,ungated ;;
    r64) part r64 "${step[@]}" --rows 4 --backbones nf4 --ranks 64 --arms peft_bf16,ours,ungated,ours_dropout,cut ;;
    short) part short "${step[@]}" --rows 1 --backbones nf4 --ranks 16 --arms peft,peft_bf16,ours ;;
    recompute) part recompute "${step[@]}" --rows 4 --checkpointing on --backbones nf4 --ranks 16 --arms peft_bf16,ours ;;
    bf16) part bf16 "${step[@]}" --rows 4 --backbones bf16 --ranks 16 --arms peft_bf16,ours ;;
    compiled) part compiled "${step[@]}" --rows 4 --backbones nf4 --ranks 16 --arms "ours,$compiled" ;;
    compiled_short) part compiled_short "${step[@]}" --rows 1 --backbones nf4 --ranks 16 --arms "ours,$compiled" ;;
    liger) part liger "${step[@]}" --rows 4 --backbones nf4 --ranks 16 --arms peft_bf16,ours --liger ;;
    kernels)
      if [ "$gpus" = 0 ]; then
        echo "== kernels: needs a GPU, left out"
      else
        part kernels python3 benchmarks/gpu_kernels.py
      fi
      ;;
    run) part run "${run[@]}" train.gradient_accumulation_steps=4 "${small[@]}" ;;
    run_open) part run_open "${run[@]}" "${open[@]}" "${small[@]}" ;;
    run_compiled) part run_compiled "${run[@]}" "${open[@]}" train.torch_compile=true "${small[@]}" ;;
    zero2 | zero3)
      part "$name" torchrun --standalone --nproc_per_node "$processes" benchmarks/zero.py "$name" "${shape[@]}" \
        "${rounds[@]}" --tokens "$tokens"
      ;;
    *)
      echo "benchmarks/gpu.sh: there is no part $name" >&2
      exit 2
      ;;
  esac
done
if [ "$failed" = 0 ]; then
  rm -rf "$folder/model"
elif [ -d "$folder/model" ]; then
  echo "== something failed: $folder/model is kept, with the checkpoint that was made and the directories of failed runs"
fi
exit "$failed"
