"""In a loop of one's own RankScheduler does what a run does, whatever the loop does between steps."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import dense_delta, randomise_all, relative_error, tiny_llama
from runs import CONFIG, gsm8k_overrides
from small_runs import delta_weights
from spawn import spawn
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
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **OF_A_RUN))

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    inject_sora(model, r=R, lora_alpha=16)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(seen[0]["values"][name])
    optimizer = ProxAdamW(parameter_groups(model, *seen[0]["lr"]))
    RankScheduler(model, optimizer, TARGET, dense_steps=DENSE, sparsify_steps=STEPS - DENSE)
    thresholds = []
    for of_run in seen:
        for group, rate in zip(optimizer.param_groups, of_run["lr"], strict=True):
            group["lr"] = rate
        for batch in of_run["batches"].micro_batches:
            (causal_loss_sum(model, **batch) / of_run["batches"].weight).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        thresholds.append(optimizer.param_groups[1]["sparse_lambda"])

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
    model = tiny_llama()  # which has a seed of its own
    torch.manual_seed(seed)
    return inject_sora(model, r=4, lora_alpha=8, dtype=dtype)


def made(model: nn.Module, gate_lr: float = 0.4, **options: Any) -> ProxAdamW:
    """An optimizer with a scheduler: 3 dense steps, 10 of pruning to rank 2."""
    optimizer = ProxAdamW(parameter_groups(model, 1e-2, gate_lr), amsgrad=True)
    RankScheduler(model, optimizer, **{"target_rank": 2, "dense_steps": 3, "sparsify_steps": 10, **options})
    return optimizer


def backward(model: nn.Module, number: int, take: Callable[[Tensor], None] = Tensor.backward) -> None:
    """The gradients of random tokens, the same for the same number."""
    ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(number))
    take(model(input_ids=ids, labels=ids).loss)


def train_on(model: nn.Module, optimizer: ProxAdamW, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def kept(model: nn.Module) -> int:
    layers = adapters(model)
    return rank_report(layers, {name: layer.gate for name, layer in layers.items()}).kept_params


def costs(model: nn.Module) -> list[int]:
    return [sum(shape) for shape in layer_shapes(adapters(model)).values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_of_form_changes_no_delta_and_no_object(dtype):
    model = toy(dtype)
    parameters, layers = adapter_parameters(model), adapters(model)
    optimizer = ProxAdamW(parameter_groups(model, 1e-2, 0.4), amsgrad=True)
    before: dict[str, Tensor] = {}

    def masters_of_delta(name: str) -> Tensor:
        A, B, gate = (optimizer.master(parameters[f"{name}.{kind}"]).double() for kind in ("lora_A", "lora_B", "gate"))
        return (B * gate) @ A

    # Hooks are called in the order in which they are registered: this one sees what the scheduler's finds.
    optimizer.register_step_post_hook(lambda *_: before.update({name: masters_of_delta(name) for name in layers}))
    RankScheduler(model, optimizer, 2, dense_steps=3, sparsify_steps=10)
    train_on(model, optimizer, range(3))
    assert all(parameters[name] is p for name, p in adapter_parameters(model).items()), "DDP would not know new ones"
    for name, layer in layers.items():
        assert torch.equal(layer.gate, torch.ones_like(layer.gate))
        assert relative_error(masters_of_delta(name), before[name]) < 1e-5, "in float32, if they are bfloat16 as well"
    assert kept(model) == 4 * sum(costs(model))


def test_ranks_fall_to_just_above_the_budget_and_stay_there_until_they_are_cut():
    model = toy()
    optimizer = made(model)
    train_on(model, optimizer, range(13))
    budget = 2 * sum(costs(model))
    assert budget < kept(model) <= 1.01 * budget + 2 * max(costs(model))
    optimizer.param_groups[1]["lr"] = 0.02  # a dead gate may move by that much in one step, past the threshold
    train_on(model, optimizer, range(13, 20))
    assert budget < kept(model) <= 1.01 * budget + 2 * max(costs(model)), "a step without a threshold revives all gates"
    consensus_prune(model, target_rank=2)
    assert rank_report(adapters(model)).kept_params <= budget
    with pytest.raises(RuntimeError, match="from before the adapters were cut"):
        optimizer.step()


def test_a_step_that_is_compiled_prunes_the_same():
    plain, compiled = toy(), toy()
    train_on(plain, made(plain), range(9))
    optimizer = made(compiled)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    train_on(compiled, optimizer, range(9))
    assert kept(compiled) == kept(plain) < 4 * sum(costs(plain))


def test_micro_batches_that_accelerate_accumulates_are_no_steps():
    """In its loop every micro-batch calls step, and only every second call is one."""
    plain, accumulated = toy(), toy()
    train_on(plain, made(plain), range(13))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        inner = ProxAdamW(parameter_groups(accumulated, 1e-2, 0.4), amsgrad=True)
        wrapped, optimizer = accelerator.prepare(accumulated, inner)
        RankScheduler(wrapped, optimizer, 2, dense_steps=3, sparsify_steps=10)
        for number in range(26):
            with accelerator.accumulate(wrapped):
                backward(wrapped, number // 2, accelerator.backward)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert inner.rank_scheduler.steps_taken == 13
    expected = adapter_parameters(plain)
    assert all(torch.equal(p == 0, expected[name] == 0) for name, p in adapter_parameters(accumulated).items())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_are_none(fused):
    """It does not call step then, or, of a fused optimizer, calls it to skip the step inside."""
    model = toy()
    optimizer = ProxAdamW(parameter_groups(model, 1e-2, 0.4), fused=fused)
    RankScheduler(model, optimizer, 2, dense_steps=2, sparsify_steps=10)
    scaler = torch.amp.GradScaler("cpu")
    for step, factor in enumerate((float("inf"), 1.0, float("inf"), 1.0, 1.0)):
        backward(model, step, lambda loss, factor=factor: scaler.scale(loss * factor).backward())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.rank_scheduler.steps_taken == (0, 1, 1, 2, 3)[step]
    assert all(bool(p.isfinite().all()) for p in adapter_parameters(model).values())


def test_gates_that_fell_below_the_budget_come_back():
    """A slot at 0 moves by about its learning rate in a step, and the threshold lets the best of those through."""
    model = toy()
    optimizer = made(model, sparsify_steps=30)
    train_on(model, optimizer, range(20))
    with torch.no_grad():
        for layer in list(adapters(model).values())[2:]:
            layer.gate.zero_()
    budget = 2 * sum(costs(model))
    assert kept(model) < 0.5 * budget
    train_on(model, optimizer, range(20, 22))
    assert budget <= kept(model) < 1.5 * budget, "full is 2"


@pytest.mark.parametrize("first", ["scheduler", "state"])
@pytest.mark.parametrize(
    ("stop", "dtype"), [(2, torch.float32), (3, torch.float32), (8, torch.float32), (8, torch.bfloat16)]
)
def test_a_loop_that_resumes_ends_with_the_same_bits(stop, dtype, first):
    """Model and optimizer hold all of it, whether the scheduler is made before they are loaded or afterwards."""
    straight = toy(dtype)
    train_on(straight, made(straight), range(13))
    broken = toy(dtype)
    optimizer = made(broken)
    train_on(broken, optimizer, range(stop))
    saved = copy.deepcopy([broken.state_dict(), optimizer.state_dict()])
    resumed = toy(dtype, seed=1)
    optimizer = ProxAdamW(parameter_groups(resumed, 1e-2, 0.4), amsgrad=True)
    budget = {"target_rank": 2, "dense_steps": 3, "sparsify_steps": 10}
    if first == "scheduler":
        RankScheduler(resumed, optimizer, **budget)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if first == "state":
        RankScheduler(resumed, optimizer, **budget)
    train_on(resumed, optimizer, range(stop, 13))
    expected = adapter_parameters(straight)
    assert all(torch.equal(p, expected[name]) for name, p in adapter_parameters(resumed).items())
    assert any(bool((p == 0).any()) for name, p in expected.items() if name.endswith("gate"))


def test_a_state_from_before_the_scheduler_begins_its_steps():
    """Its groups have another threshold, which would use a quantile as a λ."""
    model = toy()
    optimizer = ProxAdamW(parameter_groups(model, 1e-2, 0.4), amsgrad=True)
    train_on(model, optimizer, range(4))
    saved, optimizer = copy.deepcopy(optimizer.state_dict()), made(model, dense_steps=1)
    optimizer.load_state_dict(saved)
    train_on(model, optimizer, range(4, 15))
    assert optimizer.rank_scheduler.steps_taken == 11 and optimizer.param_groups[1]["threshold"] == "adaptive"
    assert 2 * sum(costs(model)) < kept(model) <= 2.02 * sum(costs(model)) + 2 * max(costs(model))


def test_an_older_state_takes_its_steps_back():
    model = toy()
    optimizer = made(model)
    before = copy.deepcopy([model.state_dict(), ProxAdamW(parameter_groups(model, 1e-2, 0.4)).state_dict()])
    train_on(model, optimizer, range(5))
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    assert optimizer.rank_scheduler.steps_taken == 0
    train_on(model, optimizer, range(2))


def test_a_state_with_a_scheduler_is_not_trained_on_without_one():
    """Its last threshold would stay, and the budget never be reached."""
    model = toy()
    optimizer = made(model)
    train_on(model, optimizer, range(5))
    alone = ProxAdamW(parameter_groups(model, 1e-2, 0.4))
    alone.load_state_dict(optimizer.state_dict())
    for copied in (alone, copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match="is from one with a RankScheduler"):
            train_on(model, copied, range(5, 6))


def test_a_state_from_a_scheduler_with_other_dense_steps_is_refused():
    """The gates that it has pruned would come back in a second dense phase."""
    model = toy()
    optimizer = made(model)
    train_on(model, optimizer, range(5))
    saved, optimizer = copy.deepcopy(optimizer.state_dict()), made(model, dense_steps=8)
    optimizer.load_state_dict(saved)
    with pytest.raises(UserError, match="dense_steps 3, not 8"):
        train_on(model, optimizer, range(5, 6))


def test_every_module_keeps_min_rank():
    model = toy()
    train_on(model, made(model, target_rank=1, min_rank=1), range(13))
    assert all(int(layer.gate.count_nonzero()) >= 1 for layer in adapters(model).values())
    consensus_prune(model, target_rank=1, min_rank=1)
    assert set(rank_report(adapters(model)).ranks.values()) == {1}


def test_the_optimizer_is_free_once_the_loop_has_another():
    """Its moments would take memory beside those of the cut adapters until Python looks for cycles."""
    model = toy()
    optimizer = made(model)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_a_state_without_the_importance_of_gates_is_refused():
    model = toy()
    optimizer = made(model)
    for group in optimizer.param_groups:
        group["rank_scheduler_steps"] = 5
    with pytest.raises(UserError, match="load the one that was saved with the model"):
        train_on(model, optimizer, range(1))


def without_adapters() -> tuple[nn.Module, ProxAdamW]:
    return tiny_llama(), fitting()[1]


def of_another_model() -> tuple[nn.Module, ProxAdamW]:
    return toy(), fitting()[1]


def of_torch() -> tuple[nn.Module, Any]:
    model = toy()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def fitting(**options: Any) -> tuple[nn.Module, ProxAdamW]:
    model = toy()
    return model, ProxAdamW(parameter_groups(model, 1e-2, 0.4, **options))


def already_cut() -> tuple[nn.Module, ProxAdamW]:
    model, optimizer = fitting()
    return consensus_prune(randomise_all(model), target_rank=2), optimizer


def with_one() -> tuple[nn.Module, ProxAdamW]:
    model = toy()
    return model, made(model)


def of_gates_alone() -> tuple[nn.Module, ProxAdamW]:
    model = toy()
    return model, ProxAdamW(parameter_groups(model, 1e-2, 0.4)[1:])


def of_one_group() -> tuple[nn.Module, ProxAdamW]:
    model = toy()
    return model, ProxAdamW([p for p in model.parameters() if p.requires_grad])


def with_a_frozen_gate() -> tuple[nn.Module, ProxAdamW]:
    model, optimizer = fitting()
    next(iter(adapters(model).values())).gate.requires_grad_(False)
    return model, optimizer


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
        (of_another_model, {}, "does not hold"),
        (of_gates_alone, {}, "does not hold .*lora_A"),
        (of_one_group, {}, r"does not hold .*\.gate"),
        (lambda: fitting(sparse_lambda=0.5), {}, "leave it out of parameter_groups"),
        (with_a_frozen_gate, {}, "gate is frozen"),
        (lambda: fitting(deferred=True), {}, "deferred"),
        (with_one, {}, "already has a RankScheduler"),
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
    optimizer = made(model, dense_steps=1)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(2):  # and says so again to a loop that goes on
        with pytest.raises(RunFailed, match="take more dense_steps"):
            train_on(model, optimizer, range(1))


def test_gates_that_are_not_finite_end_the_loop():
    """They would count as live, and nothing would be pruned."""
    model = toy()
    optimizer = made(model)
    train_on(model, optimizer, range(5))
    with torch.no_grad():
        next(iter(adapters(model).values())).gate[0] = torch.nan
    with pytest.raises(RunFailed, match="gates are not finite"):
        train_on(model, optimizer, range(5, 6))


def processes_that_differ() -> dict[str, str]:
    """Worker: what a step says on each of two processes that do not hold the same."""
    torch.distributed.init_process_group("gloo")
    process, found = torch.distributed.get_rank(), {}

    def said(differs: str, train: Callable[[], None]) -> None:
        try:
            train()
        except RunFailed as error:
            found[differs] = str(error)

    model = toy()
    said("settings", lambda: train_on(model, made(model, target_rank=2 + process), range(1)))
    other = toy(seed=process)
    said("adapters", lambda: train_on(other, made(other), range(3)))
    model = toy()
    optimizer = made(model)
    train_on(model, optimizer, range(5))
    with torch.no_grad():
        next(iter(adapters(model).values())).gate[:process] = torch.nan
    said("a gate of one is not finite", lambda: train_on(model, optimizer, range(5, 6)))
    torch.distributed.destroy_process_group()
    return found


def test_processes_that_differ_are_told_so_on_all_of_them():
    one, other = spawn("test_rank_scheduler:processes_that_differ", 2, {})
    assert one == other
    assert "RankScheduler differs between processes" in one["settings"] and "'budget'" in one["settings"]
    assert "the adapter differs between processes" in one["adapters"]
    assert "gates are not finite" in one["a gate of one is not finite"]
