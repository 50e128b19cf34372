"""Cutting a model: by slots or singular components, within a budget, and what its loss is right afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import dense_delta, randomise_all, relative_error, tiny_llama
from spawn import spawn
from torch import nn

from sora_llm import RunFailed, UserError, consensus_prune, export_adapter, inject_sora, pipeline
from sora_llm.budget import make_budgets
from sora_llm.hashes import tensor_hash
from sora_llm.inject import adapter_parameters, adapters
from sora_llm.local_updates import shrink_gates
from sora_llm.optim import ProxAdamW, parameter_groups

R = 6
IDS = torch.arange(40).reshape(2, 20) % 48


def trained() -> nn.Module:
    return randomise_all(inject_sora(tiny_llama(), r=R, lora_alpha=12), size=0.1)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (layer.in_features, layer.out_features) for name, layer in adapters(model).items()}


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def densely(model: nn.Module, deltas: dict[str, torch.Tensor]) -> nn.Module:
    """The base with W + ΔW as its weights."""
    dense = tiny_llama()
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = dense.get_submodule(name).weight
            weight.copy_((weight.double() + delta).float())
    return dense


@pytest.mark.parametrize("consensus", ["svd", "slots"])
def test_with_nothing_to_prune_only_rounding_changes(consensus: str) -> None:
    model = trained()
    before = logits_of(model)
    consensus_prune(model, consensus=consensus)
    assert relative_error(logits_of(model), before) < 1e-5
    assert all(layer.gate is None for layer in adapters(model).values())


def test_the_best_components_of_all_modules_are_kept_and_the_loss_is_that_of_the_dense_model() -> None:
    """Against numpy: every ΔW decomposed densely, components of all modules sorted by σ²/(I + O)."""
    model, target_rank = trained(), 1.5
    shapes = shapes_of(model)
    parts = {name: np.linalg.svd(dense_delta(layer).numpy()) for name, layer in adapters(model).items()}
    live = [
        (sigma**2 / sum(shapes[name]), name)
        for name, (_, sigmas, _) in parts.items()
        for sigma in sigmas
        if sigma > 1e-9 * sigmas[0] and sigmas[0] > 0
    ]
    left, kept = int(target_rank * sum(map(sum, shapes.values()))), dict.fromkeys(shapes, 0)
    for _, name in sorted(live, reverse=True):
        if sum(shapes[name]) <= left:
            left -= sum(shapes[name])
            kept[name] += 1
    truncated = {
        name: torch.from_numpy(u[:, : kept[name]] * sigmas[: kept[name]] @ vt[: kept[name]])
        for name, (u, sigmas, vt) in parts.items()
    }
    consensus_prune(model, target_rank=target_rank)
    assert {name: layer.rank for name, layer in adapters(model).items()} == kept
    assert relative_error(logits_of(model), logits_of(densely(model, truncated))) < 1e-5


@pytest.mark.parametrize("consensus", ["svd", "slots"])
@pytest.mark.parametrize("target_rank", [0.5, 1.0, 2.7])
def test_a_budget_is_never_exceeded_and_less_than_a_component_is_left(consensus: str, target_rank: float) -> None:
    model = trained()
    costs = {name: sum(shape) for name, shape in shapes_of(model).items()}
    consensus_prune(model, target_rank=target_rank, consensus=consensus)
    kept = sum(costs[name] * layer.rank for name, layer in adapters(model).items())
    budget = target_rank * sum(costs.values())
    assert budget - max(costs.values()) < kept <= budget
    held = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert held == kept, "what was cut takes no memory"


def test_min_rank_is_kept_where_anything_lives() -> None:
    model = trained()
    alive = {name: int(torch.count_nonzero(layer.gate)) for name, layer in adapters(model).items()}
    consensus_prune(model, target_rank=1.5, min_rank=1)
    assert {name: layer.rank > 0 for name, layer in adapters(model).items()} == {n: c > 0 for n, c in alive.items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"consensus": "magic"}, "use 'svd' or 'slots'"),
        ({"target_rank": 1, "target_params": 5}, "both set the budget"),
        ({"min_rank": 1}, "needs a budget"),
        ({"target_rank": 7}, "more than the .* or raise r if layers are wider than that$"),
        ({"target_rank": -1}, "target_rank is -1; it must be a number above 0"),
        ({"target_rank": float("nan")}, "target_rank is nan; it must be a number above 0"),
        ({"target_rank": "2"}, "target_rank is '2'; it must be a number above 0"),
        ({"target_rank": True}, "target_rank is True; it must be a number above 0"),
        ({"target_params": 0}, "target_params is 0; it must be a number above 0"),
        ({"target_params": 100.5}, "target_params is 100.5; it is a whole number"),
        ({"target_rank": 2, "min_rank": -1}, "min_rank is -1; it must be an integer from 0"),
        ({"target_rank": 0.01}, "^target_rank is .* nothing would be left"),
    ],
)
def test_what_cannot_be_is_a_sentence(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        consensus_prune(trained(), **options)


def test_a_model_without_gates_is_a_sentence() -> None:
    with pytest.raises(UserError, match="were already cut"):
        consensus_prune(consensus_prune(trained()))
    with pytest.raises(UserError, match="call inject_sora"):
        consensus_prune(tiny_llama())


def test_values_that_are_not_finite_end_with_a_sentence_and_change_nothing() -> None:
    model = trained()
    with torch.no_grad():
        next(iter(adapters(model).values())).lora_A[0, 0] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    with pytest.raises(RunFailed, match="cannot be cut"):
        consensus_prune(model, target_rank=2)
    after = adapter_parameters(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if value.isfinite().all())


def test_a_compiled_model_is_cut_like_the_one_inside() -> None:
    model, compiled = trained(), torch.compile(trained())
    consensus_prune(model, target_rank=2)
    consensus_prune(compiled, target_rank=2)
    inside = adapter_parameters(compiled._orig_mod)
    assert all(torch.equal(inside[name], parameter) for name, parameter in adapter_parameters(model).items())


def said(action: Callable[[], Any]) -> str:
    """What an action is refused with."""
    try:
        action()
    except (ValueError, RuntimeError) as error:  # UserError among them
        return str(error)
    return "nothing"


def cut_inside_ddp() -> dict[str, str]:
    """What a process sees that goes on with the wrapper that it had before the cut, and with a new one."""
    torch.distributed.init_process_group("gloo")
    model = trained()
    wrapped = {"old": nn.parallel.DistributedDataParallel(model)}

    report = {"handed over": said(lambda: consensus_prune(wrapped["old"], target_rank=2))}
    report["compiled"] = said(lambda: consensus_prune(torch.compile(wrapped["old"]), target_rank=2))
    report["not injected"] = said(lambda: inject_sora(torch.compile(wrapped["old"])))
    consensus_prune(wrapped["old"].module, target_rank=2)
    report["evaluated alone"] = said(lambda: model(input_ids=IDS))
    report["old"] = said(lambda: wrapped["old"](input_ids=IDS))
    wrapped["new"] = nn.parallel.DistributedDataParallel(model)
    report["new"] = said(lambda: wrapped["new"](input_ids=IDS).logits.sum().backward())
    wrapped.clear()  # reducers hang at the exit of a process whose group is gone
    torch.distributed.destroy_process_group()
    return report


def inside_fsdp(version: int, folder: str) -> dict[str, str]:
    """What is said of a model that FSDP shards, and whether what it trains can be exported once it is gathered."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo")
    model = trained()
    kept = torch.cat([p.detach().flatten() for p in adapter_parameters(model).values()]).clone()
    if version == 1:
        wrapped: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        wrapped = fully_shard(model)

    optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2, 0.5))
    wrapped(input_ids=IDS).logits.sum().backward()
    report = {
        "cut": said(lambda: consensus_prune(wrapped, target_rank=2)),
        "injected": said(lambda: inject_sora(wrapped)),
        "exported": said(lambda: export_adapter(model, folder)),
        "step": said(optimizer.step) if version == 2 else "nothing",
    }
    if version == 1:
        with FullyShardedDataParallel.summon_full_params(wrapped):
            now = torch.cat([p.detach().flatten() for p in adapter_parameters(model).values()])
            assert torch.equal(now, kept)
            report["gathered"] = said(lambda: export_adapter(model, f"{folder}-{torch.distributed.get_rank()}"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return report


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_a_model_that_fsdp_shards_is_refused_with_a_sentence_and_exported_once_it_is_whole(
    version: int, tmp_path: Path
) -> None:
    for report in spawn("test_consensus_prune:inside_fsdp", 2, {"version": version, "folder": str(tmp_path / "out")}):
        assert "FSDP has sharded the current ones" in report["cut"] and "FSDP has sharded" in report["injected"], report
        assert "is sharded: gather it first" in report["exported"]
        assert report.get("gathered", "nothing") == "nothing"
        assert version == 1 or "are sharded by fully_shard" in report["step"]


def cut_inside_zero(stage: int) -> str:
    """What is said of a model that an engine of DeepSpeed holds."""
    import deepspeed

    model = trained()
    optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        consensus_prune(engine.module, target_rank=2)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_a_model_in_an_engine_of_zero_is_not_cut_under_it(stage: int) -> None:
    """The engine would go on with the parameters from before, or fail at its next step."""
    assert (
        "DeepSpeed's ZeRO holds the current ones"
        in spawn("test_consensus_prune:cut_inside_zero", 1, {"stage": stage})[0]
    )


def test_an_optimizer_from_before_the_cut_is_an_error_and_not_a_run_that_learns_nothing() -> None:
    model = trained()
    optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2))
    consensus_prune(model, target_rank=2)
    model(input_ids=IDS).logits.sum().backward()
    with pytest.raises(RuntimeError, match="make a new one from parameter_groups"):
        optimizer.step()
    ProxAdamW(parameter_groups(model, 1e-3, 1e-2)).step()


def cut_with_other_algebra() -> str:
    """The cut adapter's hash where process 1 computes other last bits than process 0."""
    torch.distributed.init_process_group("gloo")
    model, rank = trained(), torch.distributed.get_rank()
    plain = pipeline.cut_factors

    def off(*arguments: Any) -> Any:
        cut = plain(*arguments)
        return replace(cut, factors={name: (A * (1 + rank * 1e-6), B) for name, (A, B) in cut.factors.items()})

    pipeline.cut_factors = off
    consensus_prune(model, target_rank=2)
    torch.distributed.destroy_process_group()
    return tensor_hash(*adapter_parameters(model).values())


def test_every_process_gets_the_same_bits_whatever_its_linear_algebra() -> None:
    one, other = spawn("test_consensus_prune:cut_with_other_algebra", 2, {})
    assert one == other


@pytest.mark.parametrize("first", [0, 1])
def test_replicas_keep_the_ranks_that_they_agreed_on_in_whatever_order(first: int) -> None:
    """One that took no step in the last round has no part in the slots that came back to life in it."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 8, generator=generator), torch.randn(6, 4, generator=generator)
    gates = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.4, 0.4])]
    mean = torch.stack(gates).mean(0)
    agreed = mean - 0.05
    replicas = [{"layer": (A + 0.01 * k, B, shrink_gates(gate, mean, agreed))} for k, gate in enumerate(gates)]
    assert [int((replica["layer"][2] != 0).sum()) for replica in replicas] == [2, 4]
    cut = pipeline.cut_factors([replicas[first], replicas[1 - first]], {"layer": 1.0}, "svd", ())
    assert cut.report is not None and cut.report.ranks == {"layer": 4}


def test_under_ddp_the_old_wrapper_is_refused_and_a_new_one_goes_on() -> None:
    """It would reduce none of the new parameters' gradients, and the processes would drift apart."""
    for report in spawn("test_consensus_prune:cut_inside_ddp", 2, {}):
        for given in ("handed over", "compiled", "not injected"):
            assert "pass model.module" in report[given]
        assert "wrap the model again" in report["old"]
        assert report["evaluated alone"] == report["new"] == "nothing"


def test_the_balanced_form_is_the_same_model_with_a_slot_per_component() -> None:
    model = trained()
    before = {name: dense_delta(layer) for name, layer in adapters(model).items()}
    logits = logits_of(model)
    masters = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    budgets = make_budgets(shapes_of(model), R, 2.0, None, {}, 0)
    values, weighed = pipeline.balance(model, masters, budgets=budgets, dtype=torch.float32, device="cpu")
    assert relative_error(logits_of(model), logits) < 1e-5
    found = adapter_parameters(model)
    assert values.keys() == found.keys() and all(torch.equal(values[name], found[name]) for name in found)
    importance = {name.removesuffix(".gate.importance"): weights for name, weights in weighed.items()}
    for name, layer in adapters(model).items():
        assert layer.rank == R and torch.equal(layer.gate, torch.ones(R))
        assert relative_error(dense_delta(layer), before[name]) < 1e-5
        sigma = torch.linalg.svdvals(before[name])[:R]
        weights = importance[name].double()
        live = sigma > 1e-9 * sigma[0] if sigma[0] > 0 else torch.zeros(R, dtype=torch.bool)
        assert torch.equal(weights > 0, live), "slots without a component have no importance"
        ratio = weights[live] / (sigma[live] / sum(shapes_of(model)[name]) ** 0.5)
        assert not len(ratio) or ratio.max() / ratio.min() - 1 < 1e-5


def test_uncut_weights_come_back_after_a_copy_was_cut() -> None:
    model = trained()
    masters = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    copied, logits = copy.deepcopy(masters), logits_of(model)
    options = {"budgets": [], "dtype": torch.float32, "device": "cpu", "replicas": None}
    pipeline.cut_by_consensus(model, masters, consensus="slots", **options)
    pipeline.restore(model, masters, torch.float32)
    assert torch.equal(logits_of(model), logits)
    found = adapter_parameters(model)
    assert found.keys() == copied.keys() and all(torch.equal(found[name], copied[name]) for name in copied)


def test_a_model_that_has_learned_nothing_is_cut_with_a_warning():
    model = inject_sora(tiny_llama(num_hidden_layers=1), r=2, lora_alpha=4)
    with pytest.warns(UserWarning, match="nothing was learned yet"):
        consensus_prune(model, target_rank=1)
    assert {layer.rank for layer in adapters(model).values()} == {0}


def test_more_slots_than_a_module_can_have_ranks_count_as_its_ranks_like_in_a_budget() -> None:
    model = inject_sora(tiny_llama(), r=100)
    shapes = shapes_of(model)
    report = pipeline.rank_report(adapters(model), {name: layer.gate for name, layer in adapters(model).items()})
    assert report.ranks == {name: min(shape) for name, shape in shapes.items()}
    assert report.mean_rank == pytest.approx(report.kept_params / sum(map(sum, shapes.values())))
