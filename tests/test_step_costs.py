"""What a step costs, counted instead of timed: operations, bytes kept for the backward pass, bytes between processes.

A number here is a promise of the design.  Who changes one says in the commit what is bought with it; how long a step
takes is measured by benchmarks/step.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import NUM_STEPS, CountOps, counted_steps
from helpers import linear4bit, tiny_llama
from spawn import spawn, warm_deepspeed
from torch import nn

from sora_llm.inject import adapter_parameters, adapters, inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.sora import SoraLinear

TOKENS, IN, OUT, R = 32, 64, 96, 8
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "linear")
FLAG_BYTES = 8  # was one of us asked to stop?
WORLD_TIMEOUT = 200


def layer(gated: bool = True, dropout: float = 0.0) -> SoraLinear:
    base = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    made = SoraLinear(base, R, lora_alpha=16, lora_dropout=dropout)
    if not gated:
        made.cut(torch.randn(R, IN), torch.randn(OUT, R))
    return made


def operations(module: nn.Module, input_needs_gradient: bool = True) -> CountOps:
    """Of one forward and backward pass whose gradients land in empty places, as after zero_grad(set_to_none=True)."""
    x = torch.randn(1, TOKENS, IN, dtype=torch.bfloat16, requires_grad=input_needs_gradient)
    dy = torch.randn(1, TOKENS, OUT, dtype=torch.bfloat16)
    with CountOps() as seen:
        module(x).backward(dy)
    return seen


# ----- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_a_layer_adds_six_products_to_its_base_and_sums_nothing_wide(gated):
    """A x, + B h, then dB, du, dA, and dx: the fewest there can be.  Two of them add to what the base layer made
    (addmm_), so there is no sum of y and of the two gradients of x."""
    seen = operations(layer(gated))
    assert seen.total(*PRODUCTS) == 2 + 6
    assert seen.counts["addmm_"] == 2
    assert seen.total("add", "add_", "clone") == 0
    # The rest is narrow: casts of factors and gradients, and the gate.  On a GPU each is a kernel, and at a few
    # thousand tokens the time to start them is what an adapter costs (benchmarks/gpu.md).
    made = seen.total("empty", "empty_like", "new_empty", "promote_types")
    assert seen.total() - made <= 2 + (15 if gated else 12)


def test_an_input_that_needs_no_gradient_costs_no_gradient_of_it():
    """The first layer's, without gradient checkpointing: neither the base layer's dx nor the branch's is computed."""
    assert operations(layer(), input_needs_gradient=False).total(*PRODUCTS) == 1 + 5


def test_a_layer_without_ranks_costs_what_its_base_costs():
    pruned = layer()
    pruned.cut(torch.empty(0, IN), torch.empty(OUT, 0))
    assert operations(pruned).counts == operations(pruned.base_layer).counts


def test_dropout_draws_its_mask_once_in_each_direction():
    """Forward and backward: it is not kept, and dA and dx share one."""
    assert operations(layer(dropout=0.1)).counts["random_"] == 2


def test_a_model_costs_its_layers_and_nothing_more():
    """Products of an injected model beside those of the frozen one: dB, B h and du for each linear; A x, dA and dx once
    for q, k and v, once for gate and up, and for each of the other two."""
    ids = torch.arange(12)[None]

    def products(model: nn.Module) -> int:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        with CountOps() as seen:
            model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
        return seen.total(*PRODUCTS)

    frozen = products(tiny_llama().requires_grad_(False))
    model = inject_sora(tiny_llama(), r=4)
    num_blocks = len(adapters(model)) // 7
    assert products(model) == frozen + num_blocks * (3 * 7 + 3 * 4)


def test_the_prox_of_all_gates_costs_a_few_operations_beside_adamw():
    """Not a few for each of them: a 7B model has 224 gates, and a launch on a GPU costs microseconds."""

    def of_a_step(sparse_lambda: float, num_layers: int) -> int:
        model = inject_sora(tiny_llama(num_hidden_layers=num_layers), r=4)
        optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2, sparse_lambda=sparse_lambda))
        for parameter in adapter_parameters(model).values():
            parameter.grad = torch.ones_like(parameter)
        with CountOps() as seen:
            optimizer.step()
        return seen.total()

    assert of_a_step(0.5, num_layers=2) - of_a_step(0.0, num_layers=2) <= 5
    assert of_a_step(0.5, num_layers=4) - of_a_step(0.0, num_layers=4) <= 5


# ----- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_for_the_backward_pass_a_model_keeps_its_linears_inputs_and_r_numbers_a_token_for_each(base):
    """Beyond what the frozen model keeps: x of every group of neighbours (less where attention keeps it anyway) and u.
    No float32 copy, no dropout mask, no y."""
    hidden, wide, layers, r, tokens = 64, 128, 2, 8, 16

    def backbone() -> nn.Module:
        model = tiny_llama(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers).to(torch.bfloat16)
        if base == "nf4":
            for name, linear in list(model.model.layers.named_modules()):
                if isinstance(linear, nn.Linear):
                    model.model.layers.set_submodule(name, linear4bit(linear.weight.detach(), torch.bfloat16))
        return model.requires_grad_(False).train()

    def kept_bytes(model: nn.Module) -> int:
        inputs = model.get_input_embeddings()(torch.arange(tokens)[None]).detach().requires_grad_()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}  # holding them, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(inputs_embeds=inputs, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())

    frozen, injected = kept_bytes(backbone()), kept_bytes(inject_sora(backbone(), r=r, lora_dropout=0.1))
    inputs = hidden + hidden + wide  # of q, k and v; of gate and up; of down
    assert injected - frozen <= 2 * tokens * layers * (inputs + hidden + 7 * r)  # + hidden: of o
    assert injected - frozen >= 2 * tokens * layers * (inputs + 7 * r)


# ----- between processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds() -> dict[str, list[dict[str, Any]]]:
    """What two processes did to each other, by strategy."""
    warm_deepspeed()
    worker = f"counting:{counted_steps.__name__}"
    return {name: spawn(worker, 2, {"strategy": name}, timeout=WORLD_TIMEOUT) for name in ("ddp", "zero2")}


def test_ddp_reduces_the_adapters_gradients_once_a_step_and_sends_a_flag(worlds):
    """The frozen backbone stays at home: gradients of adapters, 4 bytes a parameter, are all that is reduced."""
    for process in worlds["ddp"]:
        first, second, *others = process["steps"]
        reduced = [("allreduce_", process["adapter_bytes"]), ("allreduce_", FLAG_BYTES)]
        assert first == reduced and others == [reduced] * (NUM_STEPS - 2)
        # After its first backward pass DDP tells all processes the order of its buckets, once.
        agreed = [call for call in second if call[0] == "broadcast_"]
        assert [call for call in second if call[0] != "broadcast_"] == reduced
        assert sum(size for _, size in agreed) <= 8 * process["num_parameters"]


def test_zero2_reduces_gradients_gathers_updated_shards_and_agrees_on_three_scalars(worlds):
    """Six collectives a step: gradients; two scalars, the norm and whether it is finite; a shard of the factors and
    one of the gates; the flag."""
    for process in worlds["zero2"]:
        for step in process["steps"]:
            assert len(step) == 6
            scalars = [call for call in step if call[1] <= 8]
            assert len(scalars) == 3
            gathered = sum(size for name, size in step if "gather" in name)
            reduced = sum(size for name, size in step if "reduce" in name) - sum(size for _, size in scalars)
            assert reduced == process["adapter_bytes"]
            padding = 64  # shards of a group are of one size
            assert process["adapter_bytes"] / 2 <= gathered <= process["adapter_bytes"] / 2 + padding


def test_under_ddp_gradients_exist_once(worlds):
    """In the buckets that are reduced: 0.6 GB less for r = 64 on a 7B model."""
    assert all(process["gradient_storages"] == 1 for process in worlds["ddp"])


@pytest.mark.parametrize(("strategy", "times"), [("ddp", 1), ("zero2", 2)])
def test_with_two_micro_batches_ddp_reduces_once_and_zero2_twice(worlds, strategy, times):
    """What step_time.py charges for."""
    for process in worlds[strategy]:
        gradients = [size for name, size in process["accumulated"] if "reduce" in name and size > 8]
        assert gradients == [process["adapter_bytes"]] * times


def test_no_step_of_ddp_or_zero2_moves_as_much_as_the_frozen_weights_would_be(worlds):
    for processes in worlds.values():
        for process in processes:
            assert all(sum(size for _, size in step) < process["frozen_bytes"] / 2 for step in process["steps"])


def test_before_the_first_step_every_weight_travels_once(worlds):
    """DDP and DeepSpeed make all processes equal to the first one, whatever each has loaded."""
    for processes in worlds.values():
        for process in processes:
            sent = sum(size for name, size in process["start"] if name == "broadcast_")
            whole = process["adapter_bytes"] + process["frozen_bytes"]
            shapes = 32 * process["num_parameters"]  # which DDP compares first
            assert whole <= sent <= whole + shapes
            assert sum(size for _, size in process["start"]) - sent <= 8


def test_an_engine_rebuilt_after_a_cut_sends_what_the_cut_left_and_no_frozen_weight(worlds):
    """The base of a 7B model is 4 GB in NF4; the first engine has made it equal everywhere."""
    for processes in worlds.values():
        for process in processes:
            sent = sum(size for _, size in process["renewed"])
            shapes = 32 * process["num_parameters"]  # which DDP compares first
            assert process["cut_bytes"] <= sent <= process["cut_bytes"] + shapes
            assert sent < process["frozen_bytes"] / 2
