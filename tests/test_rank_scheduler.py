"""In a loop of one's own RankScheduler does what a run does, and stops and resumes like a learning-rate scheduler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import dense_delta, randomise_all, relative_error, tiny_llama
from runs import gsm8k_overrides
from small_runs import delta_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sora_llm import ProxAdamW, RankScheduler, RunFailed, UserError, consensus_prune, inject_sora, parameter_groups
from sora_llm.causal_loss import causal_loss_sum
from sora_llm.inject import adapter_parameters, adapters, layer_shapes
from sora_llm.pipeline import rank_report
from sora_llm.running import training_loop
from sora_llm.train import run

R, TARGET, STEPS, DENSE = 8, 3, 24, 6
OF_A_RUN = {
    "model.dtype": "float32",
    "quantization.load_in_4bit": False,
    "sora.r": R,
    "sora.target_rank": TARGET,
    "sora.sparse_lambda": None,
    "sora.lora_dropout": 0,
    "sora.dense_ratio": DENSE / STEPS,
    "sora.consensus": "svd",
    "train.max_steps": STEPS,
    "train.gradient_accumulation_steps": 2,
    "data.val_set_size": None,
    "output.report_to": [],
}


def test_a_loop_of_ones_own_gives_the_adapter_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: Path):
    """With the run's start, batches and rates: the same phases, components, thresholds and gates."""
    seen: list[dict[str, Any]] = []
    take = training_loop.train_step

    def recorded(engine, batches, *others, **named):
        groups = engine.optimizer.param_groups
        seen.append({"batches": batches, "lr": [group["lr"] for group in groups], "λ": groups[1]["sparse_lambda"]})
        seen[-1]["values"] = {name: p.detach().clone() for name, p in adapter_parameters(engine.module).items()}
        return take(engine, batches, *others, **named)

    monkeypatch.setattr(training_loop, "train_step", recorded)
    run("configs/llama7b.yaml", *gsm8k_overrides(tmp_path / "run", **OF_A_RUN))

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    inject_sora(model, r=R, lora_alpha=16)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(seen[0]["values"][name])
    optimizer = ProxAdamW(parameter_groups(model, *seen[0]["lr"]))
    ranks = RankScheduler(model, optimizer, TARGET, dense_steps=DENSE, sparsify_steps=STEPS - DENSE)
    thresholds = []
    for step, of_run in enumerate(seen):
        thresholds.append(optimizer.param_groups[1]["sparse_lambda"])
        for batch in of_run["batches"].micro_batches:
            (causal_loss_sum(model, **batch) / of_run["batches"].weight).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, seen[min(step + 1, STEPS - 1)]["lr"], strict=True):
            group["lr"] = rate
        ranks.step()

    assert thresholds == pytest.approx([of_run["λ"] for of_run in seen], rel=1e-4)
    assert sum(threshold > 0 for threshold in thresholds) == STEPS - DENSE
    consensus_prune(model, target_rank=TARGET)
    found, expected = adapters(model), delta_weights(tmp_path / "run")
    for name, layer in found.items():
        of_this = [delta for exported, delta in expected.items() if exported.startswith(f"base_model.model.{name}.")]
        # Both are float32; rounding is amplified by AdamW, which divides by √v.
        assert relative_error(dense_delta(layer), of_this[0]) < 1e-4, name
    assert rank_report(found).kept_params <= TARGET * sum(map(sum, layer_shapes(found).values()))


def toy(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return inject_sora(tiny_llama(), r=4, lora_alpha=8, dtype=dtype)


def train_on(model: nn.Module, optimizer: ProxAdamW, ranks: RankScheduler, steps: range) -> None:
    """Steps on random tokens, the same for the same numbers."""
    for step in steps:
        ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()


def made(model: nn.Module, **options: Any) -> tuple[ProxAdamW, RankScheduler]:
    optimizer = ProxAdamW(parameter_groups(model, 1e-2, 0.4), amsgrad=True)
    return optimizer, RankScheduler(model, optimizer, 2, **{"dense_steps": 3, "sparsify_steps": 10, **options})


def kept(model: nn.Module) -> int:
    layers = adapters(model)
    return rank_report(layers, {name: layer.gate for name, layer in layers.items()}).kept_params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_fall_to_just_above_the_budget_and_the_change_of_form_changes_nothing(dtype):
    model = toy(dtype)
    optimizer, ranks = made(model)
    train_on(model, optimizer, ranks, range(2))
    full, layers, parameters = kept(model), adapters(model), adapter_parameters(model)

    def masters_of_delta(name: str) -> Tensor:
        A, B, gate = (optimizer.master(parameters[f"{name}.{kind}"]).double() for kind in ("lora_A", "lora_B", "gate"))
        return (B * gate) @ A

    before: dict[str, Tensor] = {}

    def step() -> None:  # between the third optimizer step and what the scheduler does after it
        before.update({name: masters_of_delta(name) for name in layers})
        ranks.step()

    train_on(model, optimizer, SimpleNamespace(step=step), range(2, 3))
    assert all(parameters[name] is p for name, p in adapter_parameters(model).items()), "DDP would not know new ones"
    for name, layer in layers.items():
        assert torch.equal(layer.gate, torch.ones_like(layer.gate))
        assert relative_error(masters_of_delta(name), before[name]) < 1e-5, "in float32, if they are bfloat16 as well"
    assert kept(model) == full

    train_on(model, optimizer, ranks, range(3, 13))
    budget = 2 * sum(map(sum, layer_shapes(layers).values()))
    largest = max(map(sum, layer_shapes(layers).values()))
    assert budget < kept(model) <= 1.01 * budget + 2 * largest
    assert all(group["sparse_lambda"] == 0 for group in optimizer.param_groups), "nothing is pruned afterwards"
    consensus_prune(model, target_rank=2)
    assert rank_report(adapters(model)).kept_params <= budget
    ranks.step()  # a loop that goes on with the old scheduler


def test_a_model_that_is_cut_too_early_is_a_sentence():
    model = toy()
    optimizer, ranks = made(model)
    train_on(model, optimizer, ranks, range(5))
    consensus_prune(model, target_rank=2)
    with pytest.raises(UserError, match="already cut"):
        ranks.step()


def test_gates_that_fell_below_the_budget_come_back():
    """A slot at 0 moves by about its learning rate in a step, and the threshold lets the best of those through."""
    model = toy()
    optimizer, ranks = made(model, sparsify_steps=30)
    train_on(model, optimizer, ranks, range(20))
    with torch.no_grad():
        for layer in list(adapters(model).values())[2:]:
            layer.gate.zero_()
    budget = 2 * sum(map(sum, layer_shapes(adapters(model)).values()))
    assert kept(model) < 0.5 * budget
    train_on(model, optimizer, ranks, range(20, 22))
    assert kept(model) >= budget


@pytest.mark.parametrize("stop", [2, 3, 8])
def test_a_loop_that_resumes_from_its_state_dicts_ends_with_the_same_bits(stop):
    straight = toy()
    train_on(straight, *made(straight), range(13))
    first = toy()
    optimizer, ranks = made(first)
    train_on(first, optimizer, ranks, range(stop))
    saved = copy.deepcopy([first.state_dict(), optimizer.state_dict(), ranks.state_dict()])
    second = toy(seed=1)
    optimizer, ranks = made(second)
    for part, state in zip((second, optimizer, ranks), saved, strict=True):
        part.load_state_dict(state)
    train_on(second, optimizer, ranks, range(stop, 13))
    expected = adapter_parameters(straight)
    assert all(torch.equal(p, expected[name]) for name, p in adapter_parameters(second).items())
    assert any(bool((p == 0).any()) for name, p in expected.items() if name.endswith("gate"))


def test_a_loop_that_resumes_without_the_optimizers_state_is_told_so():
    model = toy()
    _, ranks = made(model)
    with pytest.raises(UserError, match="load the state_dict that was saved at that step"):
        ranks.load_state_dict({"step": 5})


def without_adapters() -> tuple[nn.Module, ProxAdamW]:
    model = toy()
    return tiny_llama(), ProxAdamW(parameter_groups(model, 1e-2, 0.4))


def of_another_model() -> tuple[nn.Module, ProxAdamW]:
    return toy(), ProxAdamW(parameter_groups(toy(), 1e-2, 0.4))


def of_torch() -> tuple[nn.Module, Any]:
    model = toy()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def fitting() -> tuple[nn.Module, ProxAdamW]:
    model = toy()
    return model, ProxAdamW(parameter_groups(model, 1e-2, 0.4))


def already_cut() -> tuple[nn.Module, ProxAdamW]:
    model, optimizer = fitting()
    return consensus_prune(randomise_all(model), target_rank=2), optimizer


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (fitting, {"target_rank": None}, "needs a budget"),
        (fitting, {"target_params": 100}, "give only one"),
        (fitting, {"target_rank": 5}, "more than the"),
        (fitting, {"target_rank": 0}, "must be a number above 0"),
        (fitting, {"dense_steps": 0}, "dense_steps is 0; it must be an integer from 1"),
        (fitting, {"sparsify_steps": 2.5}, "sparsify_steps is 2.5"),
        (fitting, {"min_rank": 3}, "min_rank"),
        (without_adapters, {}, "no SoRA adapters"),
        (already_cut, {}, "already cut"),
        (of_another_model, {}, "does not hold the model's gates"),
        (of_torch, {}, "needs a ProxAdamW, not AdamW"),
    ],
)
def test_what_cannot_be_scheduled_is_a_sentence(
    make: Callable[[], tuple[nn.Module, Any]], options: dict[str, Any], said: str
):
    model, optimizer = make()
    with pytest.raises(UserError, match=said):
        RankScheduler(model, optimizer, **{"target_rank": 2, "dense_steps": 3, "sparsify_steps": 10, **options})


def test_a_model_that_has_learned_nothing_is_not_pruned_blindly():
    model = toy()
    optimizer, ranks = made(model, dense_steps=1)
    with pytest.raises(RunFailed, match="take more dense_steps"):
        ranks.step()
    assert all(isinstance(group["sparse_lambda"], float) for group in optimizer.param_groups)


def test_it_sees_the_optimizer_in_a_wrapper_and_the_model_in_ddp():
    model, optimizer = fitting()
    wrapped = SimpleNamespace(module=model, optimizer=optimizer)
    ranks = RankScheduler(model, wrapped, 2, dense_steps=1, sparsify_steps=2)
    train_on(model, optimizer, ranks, range(2))
    threshold: Tensor | float = optimizer.param_groups[1]["sparse_lambda"]
    assert threshold > 0
