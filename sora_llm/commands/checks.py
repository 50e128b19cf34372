"""Small checks of a machine, each in a process of its own: `python -m sora_llm.commands.checks NAME`.

A check reports one line of JSON at the end of its output; a failed one ends with a sentence and exit code 1.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm.backbone import load_backbone, quiet_libraries
from sora_llm.base_spec import BackboneSpec
from sora_llm.causal_loss import causal_loss_sum
from sora_llm.distributed.collectives import any_process, sum_over_processes
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import local_device, make_accelerator
from sora_llm.errors import RunFailed, UserError
from sora_llm.extensions import NOT_BUILT, OPERATOR
from sora_llm.inject import adapter_parameters, inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running.packing_check import check_packing
from sora_llm.topology import deepspeed_config, launched_world

MAX_PRODUCT_ERROR = 1e-4
"""Relative, in a 4-bit layer's float32 products: a correct kernel rounds to 1e-6."""
MAX_QUANTISATION_ERROR = 0.15
"""Relative, in NF4 weights: about 0.09 for normally distributed ones."""


def main() -> int:
    """Run the check that the command line names."""
    quiet_libraries()
    torch.set_num_threads(1)
    if 0 < torch.cuda.device_count() < int(os.environ.get("WORLD_SIZE", "1")):  # too few GPUs: use the CPU
        again = [sys.executable, "-m", "sora_llm.commands.checks", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    try:
        said = CHECKS[sys.argv[1]]()
    except (UserError, RunFailed, AssertionError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"said": said}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the threads of a process group may outlive it


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """A random LLaMA with two layers."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.2, **options)).eval()


def devices() -> str:
    """The devices that torch can compute on."""
    if not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
        return f"no GPU ({built}), {os.cpu_count()} CPU cores"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "" if properties.major >= 8 else ", without bfloat16"
        found.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB{bf16})")
    torch.ones(8, device="cuda").sum().item()  # an incompatible driver fails here
    return ", ".join(found)


def group() -> str:
    """Add up a number over two processes."""
    world = launched_world(os.environ)
    accelerator = make_accelerator("ddp", world, timeout_minutes=2)
    (total,) = sum_over_processes(float(world.process_index + 1), device=accelerator.device)
    expected = world.num_processes * (world.num_processes + 1) / 2
    assert total == expected, f"the all-reduce of {world.num_processes} processes gave {total:g}, not {expected:g}"
    backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
    return f"{world.num_processes} processes on {backend}"


def nf4() -> str:
    """Compare a 4-bit layer, forward and backward, with the same weights, dense."""
    device = local_device()
    dense = tiny_llama()
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        spec = BackboneSpec(folder, dtype="float32", load_in_4bit=True, compute_dtype="float32")
        model = load_backbone(spec, device)
    name = "model.layers.0.mlp.down_proj"
    weight = dict(dense.named_parameters())[f"{name}.weight"].detach()
    check_4bit(model.get_submodule(name), weight.to(device))
    return f"forward and backward are right on {device.type}"


def check_4bit(layer: nn.Module, weight_OI: torch.Tensor) -> None:
    """AssertionError unless the layer multiplies by the weights that it was quantised from, in both directions."""
    num_out, num_in = weight_OI.shape
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        stored = layer(torch.eye(num_in, device=weight_OI.device)).T
    x = torch.randn(5, num_in, generator=generator).to(weight_OI.device).requires_grad_(True)
    dy = torch.randn(5, num_out, generator=generator).to(weight_OI.device)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None, "a 4-bit layer passes no gradient back"
    errors = {
        "weights": (_relative(stored, weight_OI), MAX_QUANTISATION_ERROR),
        "forward": (_relative(y.detach(), x.detach() @ stored.T), MAX_PRODUCT_ERROR),
        "backward": (_relative(x.grad, dy @ stored), MAX_PRODUCT_ERROR),
    }
    for what, (error, limit) in errors.items():
        assert error <= limit, f"the {what} of a 4-bit layer is off by {error:.1e} (allowed {limit:g})"


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def packing() -> str:
    """Check that packed rows do not see each other in a LLaMA."""
    device = local_device()
    model: nn.Module = tiny_llama(attn_implementation="sdpa")
    check_packing(model.to(device), "sdpa", device)
    return f"packed rows are isolated under sdpa on {device.type}"


def zero2() -> str:
    """Compare one step of an adapter under ZeRO-2 in two processes with the same step in one."""
    world = launched_world(os.environ)
    options = deepspeed_config("zero2", max_grad_norm=1.0, adapter_dtype="float32")
    alone, shared = (inject_sora(tiny_llama(), r=4, lora_alpha=8) for _ in range(2))
    shared.load_state_dict(copy.deepcopy(alone.state_dict()))
    try:
        accelerator = make_accelerator("zero2", world, deepspeed_config=options, timeout_minutes=2)
    except (RuntimeError, ImportError) as error:
        if OPERATOR not in str(error):
            raise
        raise RunFailed(f"{NOT_BUILT}: {why_not_built(str(error))}") from error
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1)).to(accelerator.device)
    alone.to(accelerator.device)

    optimizer = _optimizer(alone)
    causal_loss_sum(alone, ids, ids).div(ids.numel()).backward()
    torch.nn.utils.clip_grad_norm_(list(adapter_parameters(alone).values()), 1.0)
    optimizer.step()
    expected = {name: p.detach().float().cpu() for name, p in adapter_parameters(alone).items()}
    assert any(bool(value.any()) for name, value in expected.items() if "lora_B" in name), "a step learns nothing"

    engine = Engine(accelerator, shared, _optimizer(shared), "zero2", 1.0)
    with engine.micro_batch(last=True):
        engine.backward(causal_loss_sum(engine.model, ids, ids) / ids.numel())
    engine.step()
    engine.check_agreement()
    found = engine.masters()
    worst = max(float((found[name] - value).norm() / value.norm().clamp(min=1e-6)) for name, value in expected.items())
    off = any_process(worst > 1e-3, accelerator.device)
    assert not off, f"a step under ZeRO-2 is not the step of one process (off by {worst:.1e})"
    return f"a step of {world.num_processes} processes is that of one (to {worst:.0e}), on {accelerator.device.type}"


def why_not_built(output: str) -> str:
    """The line of a failed build's output that names the cause, not the commands around it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "not found" in line or "error:" in line), lines[0])[:200]


def _optimizer(model: nn.Module) -> ProxAdamW:
    return ProxAdamW(parameter_groups(model, learning_rate=1e-2, gate_lr=1e-2, sparse_lambda=0.3))


CHECKS: dict[str, Callable[[], str]] = {
    "devices": devices,
    "group": group,
    "nf4": nf4,
    "packing": packing,
    "zero2": zero2,
}

if __name__ == "__main__":
    sys.exit(main())
