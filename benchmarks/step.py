"""The cost of an adapter on a frozen backbone: time and peak memory of a step, against PEFT and against the floor.

    python benchmarks/step.py                                  # bf16 and NF4, r 8 and 64, 512 tokens: some minutes
    python benchmarks/step.py --tokens 512,2048 --checkpointing off,on      # the whole grid
    python benchmarks/step.py --device cuda --shape 7b --layers 32 --backbones nf4 --tokens 2048 --checkpointing on

A LLaMA with random weights; every arm is a copy that shares the frozen weights, with adapters on all linears and, if
arms compute the same function, the same factors (their losses and gradient norms are compared, so that no broken step
is timed).  A step is the forward pass, the loss and the backward pass down to the embedded inputs:

    floor           the frozen blocks alone
    peft            PEFT's LoRA with its defaults (float32 factors, x cast to float32)
    peft_bf16       PEFT's LoRA with factors in the backbone's dtype
    peft_dropout    peft with a dropout of 0.05
    adalora         PEFT's AdaLoRA without its orthogonality loss
    gated           SoRA's formula as written, left to autograd
    ours            inject_sora
    ungated         ours without gates: LoRA by our layer, so that ours − ungated is the cost of gates
    ours_dropout    ours with a dropout of 0.05
    cut             ours after consensus_prune to a quarter of the ranks
    …_compiled      floor, peft_bf16, ours or cut with its blocks under torch.compile, as train.torch_compile does it;
                    only if named in --arms, and with a warm-up of seconds to minutes each

Arms take steps in turn (A B C A B C …) in one process; reported are the median over rounds of the ratio to the floor's
step of the same round, with quartiles, and the ratio of the minimum times over all rounds: other jobs on a shared
machine can only add time, so with many rounds the minimum is the time of the work itself.  The clock on a CPU is the
process's if it has one thread (less affected by other jobs), else wall time; on CUDA events.  Memory of a step, above
its start: `saved` for the backward pass by unique storage, without frozen weights; `peak` of the allocator (on a CPU by
torch's profiler); `RSS` by the kernel.  --out appends JSON lines; the table is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import keep_freed_memory, machine, peak_bytes, quartiles, rss_bytes, seconds_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm import ProxAdamW, consensus_prune, inject_sora, parameter_groups
from sora_llm.backbone import enable_checkpointing
from sora_llm.compiled import CompiledBlocks
from sora_llm.inject import adapters, forbid_cpu_repack
from sora_llm.targets import target_linears

ARMS = ("floor", "peft", "peft_bf16", "peft_dropout", "adalora", "gated", "ours", "ungated", "ours_dropout", "cut")
COMPILED = "_compiled"
COMPILED_ARMS = tuple(name + COMPILED for name in ("floor", "peft_bf16", "ours", "cut"))
SAME_FUNCTION = ("peft", "peft_bf16", "gated", "ours", "ungated")
DROPOUT, LORA_ALPHA, KEPT_SHARE = 0.05, 16, 0.25
LEARNING_RATE = 1e-8  # the optimizer does its work and every step is the same

SHAPES = {  # hidden, intermediate, layers, heads, KV heads, vocabulary
    "tiny": (64, 176, 1, 2, 2, 64),
    "small": (1024, 2816, 2, 16, 16, 256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
}


# ------------------------------------------------------------------------------------------------------------ backbones


def make_backbone(
    shape: str,
    layers: int | None,
    backbone: str,
    device: torch.device,
    quant_storage: torch.dtype = torch.uint8,
    vocabulary_of_at_least: int = 0,
) -> LlamaForCausalLM:
    """Frozen LLaMA blocks with random weights in bfloat16, their linears quantised under "nf4"."""
    hidden, intermediate, all_layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=max(vocabulary, vocabulary_of_at_least),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if backbone == "nf4":
        for name, linear in target_linears(model).items():
            model.set_submodule(name, quantised(linear, quant_storage))
        forbid_cpu_repack(model)
    return model.requires_grad_(False).train()


def use_liger(model: nn.Module) -> None:
    """Liger's kernels for norms, rotary embedding and SwiGLU; loss and adapters are unchanged."""
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)


def quantised(linear: nn.Linear, quant_storage: torch.dtype) -> nn.Linear:
    """The same layer in NF4 with double quantisation and bfloat16 compute, from the weight as is, as in a run: a layer
    that loads it rounds float32, and dequantises to that."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=quant_storage,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=quant_storage,
        module=layer,
    )
    layer = layer.to(linear.weight.device)
    weight: Any = layer.weight
    found = weight.quant_state.dtype
    assert found == linear.weight.dtype, f"a run dequantises to {linear.weight.dtype}, this to {found}"
    return layer


def copy_of(model: nn.Module) -> nn.Module:
    """A separate model that shares the frozen tensors."""
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


# ----------------------------------------------------------------------------------------------------------------- arms


class PlainGated(nn.Module):
    """y = W x + s · B (g ⊙ (A x)) as in the equation, in the factors' dtype, with autograd's gradient."""

    def __init__(self, base_layer: nn.Linear, A: Tensor, B: Tensor, scaling: float):
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.gate = nn.Parameter(torch.ones(len(A), device=A.device))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A) * self.gate
        y = self.base_layer(x)
        return (y + self.scaling * nn.functional.linear(h, self.lora_B)).to(y.dtype)


Factors = Mapping[str, tuple[Tensor, Tensor]]


def random_factors(model: nn.Module, r: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A (R, I), B (O, R))} of typical size after some training, float32."""
    found = {}
    generator: torch.Generator | None = None
    for name, linear in target_linears(model).items():
        generator = generator or torch.Generator(linear.weight.device).manual_seed(1)
        options: Any = {"generator": generator, "device": linear.weight.device}
        A = torch.randn(r, linear.in_features, **options) / math.sqrt(linear.in_features)
        B = torch.randn(linear.out_features, r, **options) / math.sqrt(linear.out_features)
        found[name] = (A, B)
    return found


def make_arm(arm: str, model: nn.Module, factors: Factors, r: int) -> nn.Module:
    """The arm's model: a copy of `model` with adapters of these factors."""
    model, arm = copy_of(model), arm.removesuffix(COMPILED)
    if arm == "floor":
        return model
    if arm in ("ours", "ungated", "ours_dropout", "cut"):
        inject_sora(model, r, LORA_ALPHA, DROPOUT if arm == "ours_dropout" else 0.0)
        with torch.no_grad():
            for name, layer in adapters(model).items():
                layer.lora_A.copy_(factors[name][0])  # type: ignore[union-attr]
                layer.lora_B.copy_(factors[name][1])  # type: ignore[union-attr]
                if arm == "ungated":
                    layer.gate = None
        return consensus_prune(model, target_rank=KEPT_SHARE * r) if arm == "cut" else model
    if arm == "gated":
        for name, linear in target_linears(model).items():
            model.set_submodule(name, PlainGated(linear, *factors[name], LORA_ALPHA / r))
        return model
    return make_peft(arm, model, factors, r)


def make_peft(arm: str, model: nn.Module, factors: Factors, r: int) -> nn.Module:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    suffixes = sorted({name.rpartition(".")[2] for name in factors})
    if arm == "adalora":
        adalora = AdaLoraConfig(init_r=r, target_r=r, lora_alpha=LORA_ALPHA, target_modules=suffixes, total_step=1000)
        return get_peft_model(model, adalora)
    dropout = DROPOUT if arm == "peft_dropout" else 0.0
    config = LoraConfig(r=r, lora_alpha=LORA_ALPHA, lora_dropout=dropout, target_modules=suffixes)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=arm != "peft_bf16")
    dtype = torch.bfloat16 if arm == "peft_bf16" else torch.float32
    with torch.no_grad():
        for name, (A, B) in factors.items():
            layer: Any = peft_model.get_base_model().get_submodule(name)
            for part, factor in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
                part.to(dtype)
                part.weight.copy_(factor)
    return peft_model


@dataclasses.dataclass
class Arm:
    """A model, its optimizer, and its step on fixed inputs."""

    name: str
    model: nn.Module
    inputs: Tensor
    ids: Tensor
    optimizer: torch.optim.Optimizer | None
    compiled_blocks: CompiledBlocks | None
    loss: float = math.nan
    grad_norm: float = math.nan
    input_grad_norm: float = math.nan

    @classmethod
    def make(cls, name: str, model: nn.Module, inputs: Tensor, ids: Tensor) -> Arm:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer | None = None
        if adapters(model):
            optimizer = ProxAdamW(parameter_groups(model, LEARNING_RATE, LEARNING_RATE, sparse_lambda=0.5))
        elif trained:
            optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        return cls(name, model, inputs, ids, optimizer, CompiledBlocks(model) if name.endswith(COMPILED) else None)

    def compiled(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.compiled_blocks is None else self.compiled_blocks.active()

    def forward_backward(self) -> None:
        torch.manual_seed(0)
        with self.compiled():
            logits = self.model(inputs_embeds=self.inputs, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())
            loss.backward()
        self.loss_tensor = loss.detach()

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def note_gradients(self) -> None:
        """Keep the loss and gradient norms of the last step."""
        self.loss = float(self.loss_tensor)
        assert self.inputs.grad is not None
        self.input_grad_norm = float(self.inputs.grad.float().norm())
        self.grad_norm = math.sqrt(
            sum(float(g.double().square().sum()) for p in self.trained if (g := p.grad) is not None)
        )

    def clear(self) -> None:
        self.inputs.grad = None
        for p in self.trained:
            p.grad = None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def adapter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.trained)

    @property
    def optimizer_bytes(self) -> int:
        states = () if self.optimizer is None else self.optimizer.state.values()
        return sum(
            t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor) and t.dim()
        )


# ----------------------------------------------------------------------------------------------------------- measuring


def saved_bytes(arm: Arm) -> int:
    """Bytes of unique storages that the forward pass keeps for the backward pass, frozen weights aside."""
    weights = {t.untyped_storage().data_ptr() for t in [*arm.model.parameters(), *arm.model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), arm.compiled():
        logits = arm.model(inputs_embeds=arm.inputs, use_cache=False).logits
    del logits
    return sum(kept.values())


def limit_of(model: nn.Module, r: float) -> float:
    """Σ 6 T r (I + O) / Σ 4 T I O: operations that adapters of rank r add to those of their linears."""
    sizes = [(linear.in_features, linear.out_features) for linear in target_linears(model).values()]
    return 1.5 * r * sum(i + o for i, o in sizes) / sum(i * o for i, o in sizes)


def compare_same_functions(arms: Mapping[str, Arm]) -> None:
    """Stop if arms that compute the same function disagree by more than bfloat16 explains."""
    same = [arm for name, arm in arms.items() if name.removesuffix(COMPILED) in SAME_FUNCTION]
    for arm in arms.values():
        values = [arm.loss, arm.input_grad_norm, *([arm.grad_norm] if arm.trained else [])]
        assert all(math.isfinite(v) and v > 0 for v in values), f"{arm.name}: loss and gradient norms are {values}"
    for arm in same[1:]:
        for what in ("loss", "input_grad_norm"):
            one, other = getattr(same[0], what), getattr(arm, what)
            assert abs(one - other) < 0.03 * one, f"{arm.name} has {what} {other}, {same[0].name} {one}"


def measure(cell: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Take the steps of one cell of the grid in turn; one record per arm."""
    device = torch.device(options.device)
    model = make_backbone(options.shape, options.layers, cell["backbone"], device)
    if options.liger:
        use_liger(model)
    if cell["checkpointing"] == "on":
        enable_checkpointing(model)
    generator = torch.Generator().manual_seed(2)
    shape = (options.rows, cell["tokens"])
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    inputs = model.get_input_embeddings()(ids).detach() * 50  # embeddings of unit size, as trained ones are
    factors = random_factors(model, cell["r"])
    arms = {
        name: Arm.make(name, make_arm(name, model, factors, cell["r"]), inputs.clone().requires_grad_(), ids)
        for name in options.arms
    }
    is_single = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_single else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    updates: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(-options.warm_up, options.rounds):
        for name, arm in arms.items():
            step = seconds_of(arm.forward_backward, device, clock)
            update = seconds_of(arm.update, device, clock)
            if round_number < 0:
                arm.note_gradients()
            else:
                seconds[name].append(step)
                updates[name].append(update)
            arm.clear()
    compare_same_functions(arms)
    records = []
    for name, arm in arms.items():
        gc.collect()
        memory: dict[str, float | None] = {"saved": saved_bytes(arm), "peak": peak_bytes(arm.forward_backward, device)}
        arm.clear()
        memory["rss"] = rss_bytes(arm.forward_backward) if device.type == "cpu" else None
        arm.clear()
        q1, ratio, q3 = quartiles([own / floor for own, floor in zip(seconds[name], seconds["floor"], strict=True)])
        kind = name.removesuffix(COMPILED)
        rank = KEPT_SHARE * cell["r"] if kind == "cut" else cell["r"]
        records.append(
            {
                **cell,
                "arm": name,
                "step_seconds": statistics.median(seconds[name]),
                "ratio": [q1, ratio, q3],
                "least_ratio": min(seconds[name]) / min(seconds["floor"]),
                "limit": 0.0 if kind == "floor" else limit_of(model, rank),
                "optimizer_seconds": statistics.median(updates[name]),
                "tokens_per_second": ids.numel() / statistics.median(seconds[name]),
                **{f"{key}_mib": None if value is None else value / 2**20 for key, value in memory.items()},
                "adapter_mib": arm.adapter_bytes / 2**20,
                "optimizer_mib": arm.optimizer_bytes / 2**20,
                "frozen_mib": frozen_bytes(model) / 2**20,
                "loss": arm.loss,
                "grad_norm": arm.grad_norm if arm.trained else None,
                "input_grad_norm": arm.input_grad_norm,
            }
        )
    return records


def frozen_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """The context that a number needs."""
    return {
        **machine(options.device),
        "shape": options.shape,
        "layers": options.layers or SHAPES[options.shape][2],
    }


# ------------------------------------------------------------------------------------------------------------- printing


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One cell of the grid as Markdown."""
    by_arm = {record["arm"]: record for record in records}
    first = records[0]

    def overhead(record: Mapping[str, Any]) -> tuple[float, float]:
        """Above the floor: by the median, by the minimum times."""
        return record["ratio"][1] - 1, record["least_ratio"] - 1

    of_all = overhead(by_arm["peft"]) if "peft" in by_arm else None
    lines = [
        f"**{first['backbone']}{', Liger' if first['liger'] else ''}, r = {first['r']}, {first['rows']} × "
        f"{first['tokens']} tokens, checkpointing {first['checkpointing']}** (load {first['load_average']})",
        "",
        "| | step, ms | tokens/s | above the floor (quartiles) | by the least | × limit | of PEFT's | optimizer, ms "
        "| saved, MiB | peak, MiB | RSS, MiB | gradient norm |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        above = least = times = of_peft = ""
        if record["arm"] != "floor":
            q1, _, q3 = (value - 1 for value in record["ratio"])
            found = overhead(record)
            above, least = f"{found[0]:+.1%} ({q1:+.1%} … {q3:+.1%})", f"{found[1]:+.1%}"
            times = " · ".join(f"{value / record['limit']:.1f}" for value in found if record["limit"])
            if of_all is not None:
                of_peft = " · ".join(f"{value / whole:.0%}" for value, whole in zip(found, of_all, strict=True))
        rss = "" if record["rss_mib"] is None else f"{record['rss_mib']:.0f}"
        norm = "" if record["grad_norm"] is None else f"{record['grad_norm']:.4g}"
        speed = f"{record['step_seconds'] * 1e3:.1f} | {record['tokens_per_second']:,.0f}"
        lines.append(
            f"| {record['arm']} | {speed} | {above} | {least} | {times} | {of_peft} | "
            f"{record['optimizer_seconds'] * 1e3:.2f} | {record['saved_mib']:.1f} | {record['peak_mib']:.1f} | {rss} | "
            f"{norm} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="bf16,nf4", help="of bf16, nf4")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--tokens", default="512")
    parser.add_argument("--rows", type=int, default=1, help="sequences of so many tokens in a step")
    parser.add_argument("--checkpointing", default="off", help="of off, on")
    parser.add_argument("--arms", default=",".join(ARMS), help="the floor is always among them")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--liger", action="store_true", help="every arm with Liger's kernels (CUDA)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    options = parser.parse_args(argv)
    arms = (*ARMS, *COMPILED_ARMS)
    for name, allowed in (("backbones", ("bf16", "nf4")), ("checkpointing", ("off", "on")), ("arms", arms)):
        values = getattr(options, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name}: {unknown[0]!r} is none of {', '.join(allowed)}")
        setattr(options, name, values)
    options.arms = [arm for arm in arms if arm == "floor" or arm in options.arms]
    options.ranks, options.tokens = (
        [int(v) for v in getattr(options, name).split(",")] for name in ("ranks", "tokens")
    )
    if min(options.rows, options.rounds, options.warm_up) < 1:
        parser.error("--rows, --rounds and --warm-up start at 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
        keep_freed_memory()
    grid = itertools.product(options.backbones, options.ranks, options.tokens, options.checkpointing)
    for backbone, r, tokens, checkpointing in grid:
        cell = {
            "backbone": backbone,
            "liger": options.liger,
            "r": r,
            "rows": options.rows,
            "tokens": tokens,
            "checkpointing": checkpointing,
        }
        taken = {**circumstances(options), "rounds": options.rounds}
        records = [{**record, **taken} for record in measure(cell, options)]
        if options.out is not None:
            with options.out.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        print(table(records) + "\n", flush=True)
    print(json.dumps({key: value for key, value in circumstances(options).items() if key != "load_average"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
