"""The loss of a frozen output head in parts (sora_llm/head_loss.py) against cross-entropy over whole logits.

    python benchmarks/head_loss.py                                      # some minutes
    python benchmarks/head_loss.py --device cuda --tokens 8192 --hidden 4096 --words 32000,128256

Loss and gradient by the head's input, of random tokens all of which are supervised, and of the same with every second
one supervised.  Both take turns (A B A B …) in one process: medians of each, and of the ratios with quartiles; peak
memory above the start (`measuring.py`).  Prints a table; *difference*: relative, of the gradients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from measuring import keep_freed_memory, machine, peak_bytes, quartiles, seconds_of
from torch import Tensor, nn
from torch.nn import functional as F

from sora_llm.head_loss import IGNORED, head_losses, supervised_tokens

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def whole(h_NH: Tensor, head: nn.Linear, targets_N: Tensor) -> Tensor:
    """The loss as it is for heads that are left: of columns, here tokens, in which anything is supervised."""
    return F.cross_entropy(head(h_NH).float(), targets_N, ignore_index=IGNORED, reduction="sum")


def in_parts(h_NH: Tensor, head: nn.Linear, targets_N: Tensor) -> Tensor:
    return head_losses(h_NH, head, targets_N, supervised_tokens(targets_N)).sum()


def measure(tokens: int, hidden: int, words: int, dtype: str, share: float, options: argparse.Namespace) -> str:
    """A line of the table."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    head = nn.Linear(hidden, words, bias=False, device=device, dtype=DTYPES[dtype]).requires_grad_(False)
    h = torch.randn(tokens, hidden, device=device).to(DTYPES[dtype])
    targets = torch.randint(words, (tokens,), device=device)
    if share < 1:
        targets[:: round(1 / share)] = IGNORED
    gradients: dict[str, Tensor] = {}

    def action(name: str, loss: Callable[[Tensor, nn.Linear, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            inputs = h.clone().requires_grad_()
            (loss(inputs, head, targets) / (tokens - 3)).backward()  # a power of two would hide a rounding
            gradients[name] = inputs.grad  # type: ignore[assignment]

        return run

    actions = {"whole": action("whole", whole), "parts": action("parts", in_parts)}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(options.rounds + 1):
        for name, run in actions.items():
            taken = seconds_of(run, device, clock)
            if round_number:  # the first warms up
                seconds[name].append(taken)
    q1, ratio, q3 = quartiles([b / a for a, b in zip(seconds["whole"], seconds["parts"], strict=True)])
    peaks = {name: peak_bytes(run, device) / 2**20 for name, run in actions.items()}
    difference = (gradients["parts"].float() - gradients["whole"].float()).norm() / gradients["whole"].float().norm()
    times = " | ".join(f"{statistics.median(seconds[name]) * 1e3:,.1f}" for name in actions)
    return (
        f"| {tokens:,} | {hidden:,} | {words:,} | {dtype} | {share:.0%} | {times} | {ratio:.2f} ({q1:.2f} … {q3:.2f}) "
        f"| {peaks['whole']:,.0f} | {peaks['parts']:,.0f} | {float(difference):.0e} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", default="bf16,fp32")
    for name, default in (("tokens", "512,2048"), ("hidden", "1024"), ("words", "4096,32000,128256")):
        parser.add_argument(f"--{name}", default=default)
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()
    print(json.dumps(machine(options.device)))
    columns = ("tokens", "hidden", "words", "", "supervised", "whole, ms", "in parts, ms", "ratio", "whole, MiB")
    print(f"| {' | '.join((*columns, 'in parts, MiB', 'difference'))} |\n{'|---' * (len(columns) + 2)}|")
    tokens, hidden, words = (
        [int(size) for size in getattr(options, name).split(",")] for name in ("tokens", "hidden", "words")
    )
    for t, h, v, dtype, share in itertools.product(tokens, hidden, words, options.dtypes.split(","), (1.0, 0.5)):
        print(measure(t, h, v, dtype, share, options), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
