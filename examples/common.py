"""Shared by the examples, unrelated to SoRA: arguments, a (4-bit) base, rows as tokens; and the final check."""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sora_llm import SoraLinear, export_adapter
from sora_llm.inject import forbid_cpu_repack

Row = dict[str, list[int]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of an example."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or hub id of the base model")
    parser.add_argument("data", type=Path, help="JSON lines with a prompt and a completion")
    parser.add_argument("out", type=Path, help="folder: out/adapter is the result")
    parser.add_argument("--prompt", default="prompt", help="name of the field with the prompt")
    parser.add_argument("--completion", default="completion", help="name of the field with the completion")
    parser.add_argument("--load-in-4bit", action="store_true", help="NF4 base, as QLoRA does")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the base's activations"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of every adapter before pruning")
    parser.add_argument("--target-rank", type=float, default=4, help="mean rank that is kept")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, both phases together")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per process and forward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="forward passes per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="peak, of the factors")
    parser.add_argument("--sequence-len", type=int, default=512, help="tokens; longer rows are cut off")
    parser.add_argument("--dev-rows", type=int, default=64, help="rows that are held out")
    parser.add_argument("--seed", type=int, default=42)
    return parser


def load_base(args: argparse.Namespace) -> nn.Module:
    """The base, quantised if asked, on this process's device."""
    dtype = getattr(torch, args.dtype)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization if args.load_in_4bit else None,
    )
    forbid_cpu_repack(model)  # else an evaluation on a CPU changes a 4-bit base, and the training on it
    return model


def text_rows(args: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, dev) rows of "prompt" and "completion", in an order set by the seed."""
    try:
        lines = [json.loads(line) for line in args.data.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [{"prompt": line[args.prompt], "completion": line[args.completion]} for line in lines]
    except KeyError as missing:
        raise SystemExit(f"{args.data} has no field {missing}: see --prompt and --completion") from None
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{args.data} cannot be read as JSON lines: {error}") from None
    if args.dev_rows < 1:
        raise SystemExit(f"--dev-rows is {args.dev_rows}; the example ends with a dev loss and needs one at least")
    if len(rows) <= args.dev_rows:
        raise SystemExit(f"{args.data} has {len(rows)} rows, and --dev-rows {args.dev_rows} leaves none to train on")
    random.Random(args.seed).shuffle(rows)
    return rows[args.dev_rows :], rows[: args.dev_rows]


def token_rows(rows: Sequence[dict[str, str]], args: argparse.Namespace) -> list[Row]:
    """ "input_ids" and "labels" of rows; the loss covers the completion and its end-of-sequence token."""
    tokenizer, tokenized = AutoTokenizer.from_pretrained(args.model), []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) < args.sequence_len:  # else none of it would be supervised
            ids, labels = prompt + completion, [-100] * len(prompt) + completion
            tokenized.append({"input_ids": ids[: args.sequence_len], "labels": labels[: args.sequence_len]})
    if not tokenized:
        raise SystemExit(f"no prompt of {args.data} is shorter than --sequence-len {args.sequence_len}")
    return tokenized


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows padded on the right, (B, T).  No mask is needed: no token sees the padding after it, which has no loss."""

    def padded(key: str, value: int) -> Tensor:
        tensors = [torch.tensor(row[key]) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}


def live_gates(model: nn.Module) -> str:
    """The number of gates that are not 0, as the end of a line; empty after the cut."""
    gates = [m.gate.detach() for m in model.modules() if isinstance(m, SoraLinear) and m.gate is not None]
    if not gates:
        return ""
    return f", {sum(int(gate.count_nonzero()) for gate in gates)} of {sum(gate.numel() for gate in gates)} gates live"


@torch.no_grad()
def loss_of(model: Any, rows: Sequence[Row], batch_size: int) -> float:
    """Mean cross-entropy over the supervised tokens of `rows`."""
    training, total = model.training, 0.0
    model.eval()
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for start in range(0, len(rows), batch_size):
        batch = {key: value.to(model.device) for key, value in collate(rows[start : start + batch_size]).items()}
        total += model(**batch, num_items_in_batch=count).loss.item()
    model.train(training)
    return total


def export_and_reload(model: nn.Module, dev: Sequence[Row], args: argparse.Namespace) -> None:
    """Write out/adapter, then load it as any user would, on a fresh base, and compare the dev loss."""
    trained = loss_of(model, dev, args.batch_size)
    certificate = export_adapter(model, args.out / "adapter", layout="padded")
    reloaded = loss_of(PeftModel.from_pretrained(load_base(args), args.out / "adapter"), dev, args.batch_size)
    ranks = [module["rank"] for module in certificate["modules"].values()]
    print(f"ranks {min(ranks)} to {max(ranks)}; dev loss {trained:.4f}, reloaded by PEFT {reloaded:.4f}", flush=True)
