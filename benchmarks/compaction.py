"""What cutting the adapters inside the run saves: step time, optimizer state and reduced gradients, before and after.

    python benchmarks/compaction.py [--tokens 512] [--hidden 1024] [--layers 2] [--r 64] [--share 0.25] [--rounds 7]

LLaMA blocks with random weights in bfloat16, SoRA on all linears with float32 adapters.  Three copies take turns
(A B C A B C) in one process; medians of the ratios of neighbouring steps:

    gated     r slots and their gates, as in a run that never compacts
    cut       the same after consensus to `share` of the parameters (svd), as in the finetune phase of a run
    floor     the frozen blocks alone, forward and backward to their inputs

Prints a table and writes nothing.  On CUDA the same with synchronised clocks.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm import ProxAdamW, consensus_prune, inject_sora, parameter_groups
from sora_llm.inject import adapter_parameters, adapters


def blocks(hidden: int, layers: int) -> nn.Module:
    """Random LLaMA blocks in bfloat16; a small vocabulary, so that the head costs little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    model: nn.Module = LlamaForCausalLM(config)
    model.requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16).train()


def step_of(model: nn.Module, ids: Tensor, optimizer: ProxAdamW | None) -> Callable[[], float]:
    """One forward, backward and optimizer step; returns its seconds."""
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]

    def step() -> float:
        synchronise()
        started = time.perf_counter()
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        inputs.grad = None
        synchronise()
        return time.perf_counter() - started

    return step


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sizes(model: nn.Module, optimizer: ProxAdamW) -> tuple[int, int, int]:
    """Adapter parameters, bytes of the optimizer's state, bytes of gradients that are reduced per step."""
    parameters = list(adapter_parameters(model).values())
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    return sum(p.numel() for p in parameters), state, sum(p.numel() * p.element_size() for p in parameters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 512, "hidden": 1024, "layers": 2, "r": 64, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--share", type=float, default=0.25)
    arguments = parser.parse_args()
    floor = blocks(arguments.hidden, arguments.layers)
    gated = inject_sora(copy.deepcopy(floor), r=arguments.r, lora_alpha=16)
    with torch.no_grad():
        for layer in adapters(gated).values():
            layer.lora_B.normal_(0, 0.01)  # type: ignore[union-attr]
    cut = consensus_prune(copy.deepcopy(gated), target_rank=arguments.share * arguments.r)
    ids = torch.randint(256, (1, arguments.tokens), device=next(floor.parameters()).device)
    optimizers = {
        "gated": ProxAdamW(parameter_groups(gated, 1e-4, 1e-2, sparse_lambda=0.5)),
        "cut": ProxAdamW(parameter_groups(cut, 1e-4, 1e-2)),
    }
    models = {"gated": gated, "cut": cut, "floor": floor}
    steps = {name: step_of(model, ids, optimizers.get(name)) for name, model in models.items()}
    for step in steps.values():
        step()  # creates the optimizer's state, chooses kernels
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            seconds[name].append(step())

    def ratio(one: str, other: str) -> str:
        found = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        return f"{statistics.median(found):.3f} ({min(found):.3f}–{max(found):.3f})"

    def over_floor(name: str) -> float:
        found = [a - b for a, b in zip(seconds[name], seconds["floor"], strict=True)]
        return statistics.median(found) / statistics.median(seconds["floor"])

    (p1, s1, g1), (p2, s2, g2) = (sizes(models[name], optimizers[name]) for name in ("gated", "cut"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(arguments)}\n")
    print("| | gated | cut | cut / gated |\n|---|---|---|---|")
    print(
        f"| step, s | {statistics.median(seconds['gated']):.3f} | {statistics.median(seconds['cut']):.3f} | "
        f"{ratio('cut', 'gated')} |"
    )
    print(f"| time above the frozen blocks | {over_floor('gated'):+.1%} | {over_floor('cut'):+.1%} | |")
    print(f"| adapter parameters | {p1:,} | {p2:,} | {p2 / p1:.3f} |")
    print(f"| optimizer state, MiB | {s1 / 2**20:.2f} | {s2 / 2**20:.2f} | {s2 / s1:.3f} |")
    print(f"| gradients reduced per step, MiB | {g1 / 2**20:.2f} | {g2 / 2**20:.2f} | {g2 / g1:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
