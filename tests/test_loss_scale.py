"""float16 backbones: the gradients that reach the optimizer are those of float32, to float16's rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from helpers import randomise_all
from small_runs import CONFIG, Playground, interrupt, lines, overrides, result
from torch import Tensor

from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec, computes_in_float16
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.files import file_sha256
from sora_llm.inject import adapter_parameters, inject_sora
from sora_llm.loss_scale import BACKOFF_EXPONENT, GROWTH_INTERVAL, INIT_EXPONENT, MAX_EXPONENT, LossScale
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running.optimizer_step import StepBatches, train_step
from sora_llm.topology import World
from sora_llm.train import run


class Recorder(ProxAdamW):
    """Keeps the gradients of the last step it was asked for."""

    seen: list[Tensor]

    def step(self, closure: Any = None) -> Any:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def engine_of(dtype: str, loss_scale: LossScale, **quantised: Any) -> Engine:
    model = load_backbone(BackboneSpec(str(shared("models/base5m")), dtype=dtype, **quantised), "cpu")
    torch.manual_seed(0)
    randomise_all(inject_sora(model, r=4, lora_alpha=8), size=0.02)
    optimizer = Recorder(parameter_groups(model, 1e-3, 1e-3))
    accelerator = make_accelerator("none", World(1, 0, 0))
    return Engine(accelerator, model, optimizer, "none", None, loss_scale=loss_scale)


def a_part_of(weight: float, nan: bool = False) -> StepBatches:
    """A step of `weight` supervised tokens, of which two rows of 64 are here."""
    ids = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(2))
    rows: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    if nan:
        rows["loss_weights"] = torch.full(ids.shape, torch.nan)
    return StepBatches([rows], weight, weight, 126, 128)


def gradients(dtype: str, weight: float, loss_scale: LossScale | None = None, **quantised: Any) -> Tensor:
    engine = engine_of(dtype, loss_scale or LossScale(is_needed=False), **quantised)
    _, outcome = train_step(engine, a_part_of(weight), 1)
    assert not outcome.skipped
    assert isinstance(engine.optimizer, Recorder)
    found = torch.cat([gradient.flatten() for gradient in engine.optimizer.seen])
    assert outcome.grad_norm == pytest.approx(float(found.double().norm()), rel=1e-5)
    return found


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


NF4 = {"load_in_4bit": True}


@pytest.mark.parametrize(
    ("exact", "halved"),
    [
        (("float32", {}), ("float16", {})),
        (("float32", NF4 | {"compute_dtype": "float32"}), ("float16", NF4 | {"compute_dtype": "float16"})),
        (("float32", NF4 | {"compute_dtype": "float32"}), ("float32", NF4 | {"compute_dtype": "float16"})),
    ],
    ids=["plain", "nf4", "nf4 in float16 alone"],
)
def test_float16_gradients_of_many_tokens_are_those_of_float32(exact: tuple[str, Any], halved: tuple[str, Any]) -> None:
    assert computes_in_float16(BackboneSpec(str(shared("models/base5m")), dtype=halved[0], **halved[1]))
    assert not computes_in_float16(BackboneSpec(str(shared("models/base5m")), dtype=exact[0], **exact[1]))
    for weight in (126.0, 2.0**18):
        expected = gradients(exact[0], weight, **exact[1])
        assert off(gradients(halved[0], weight, LossScale(is_needed=True), **halved[1]), expected) < 5e-3
    assert off(gradients(halved[0], weight, **halved[1]), expected) > 0.1, "without a scale, or the test shows nothing"


def test_a_step_that_overflows_is_taken_again_with_a_lower_scale() -> None:
    scale, weight = LossScale(is_needed=True), 2.0**-6  # of a token: 2^16 / weight is beyond float16
    expected = gradients("float32", weight)
    assert off(gradients("float16", weight, scale), expected) < 5e-3
    assert 1 <= scale.factor < 2.0**INIT_EXPONENT


def test_a_loss_that_is_no_number_is_skipped_and_costs_the_scale_nothing() -> None:
    scale = LossScale(is_needed=True)
    engine = engine_of("float16", scale)
    before, proven = engine.masters(), []
    _, outcome = train_step(engine, a_part_of(126.0, nan=True), 1, before_step=lambda: proven.append(1))
    assert outcome.skipped and scale.factor == 2.0**INIT_EXPONENT and proven == [1]
    after = engine.masters()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, outcome = train_step(engine, a_part_of(126.0), 1)
    assert not outcome.skipped


def test_the_scale_falls_to_one_and_rises_by_and_by() -> None:
    scale = LossScale(is_needed=True)
    falls = 0
    while scale.back_off():
        falls += 1
        low = scale.factor
    assert (falls, low, scale.factor) == (INIT_EXPONENT // BACKOFF_EXPONENT, 1.0, 2.0**INIT_EXPONENT)
    assert scale.back_off()
    for _ in range(GROWTH_INTERVAL):
        assert scale.factor == 2.0 ** (INIT_EXPONENT - BACKOFF_EXPONENT)
        scale.hold()
    assert scale.factor == 2.0 ** (INIT_EXPONENT - BACKOFF_EXPONENT + 1)
    again = LossScale(is_needed=True)
    again.load(scale.state())
    assert again.factor == scale.factor
    for _ in range(GROWTH_INTERVAL * MAX_EXPONENT):
        scale.hold()
    assert scale.factor == 2.0**MAX_EXPONENT
    idle = LossScale(is_needed=False)
    idle.load(scale.state())
    for _ in range(GROWTH_INTERVAL):
        idle.hold()
    assert idle.factor == 1.0 and not idle.back_off()


def test_an_engine_that_is_spent_leaves_gradients_alone() -> None:
    engine = engine_of("float16", LossScale(is_needed=True))
    with engine.released() as model:
        parameter = next(iter(adapter_parameters(model).values()))
        parameter.sum().backward()
        assert parameter.grad is not None and bool((parameter.grad == 1).all())


HALF: dict[str, Any] = {"model.dtype": "float16", "output.save_steps": 2}


def saved_scales(run_dir: Path, step: int = 2) -> list[list[int]]:
    """Exponent and finite steps of every replica."""
    state = json.loads((run_dir / "checkpoints" / f"step-{step}" / "state.json").read_text())
    found: list[list[int]] = state["loss_scale"]
    return found


def test_a_float16_run_is_nearly_that_of_float32_and_goes_on_where_it_was(ground: Playground, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        run(CONFIG, *overrides(ground.folder, tmp_path / dtype, **{**HALF, "model.dtype": dtype}))
    exact, half = (
        [line for line in lines(tmp_path / dtype, "metrics.jsonl") if "grad_norm" in line]
        for dtype in ("float32", "float16")
    )
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in half] == pytest.approx([line[name] for line in exact], rel=0.02), name
    assert all(line["loss_scale"] >= 1 for line in half) and not any("loss_scale" in line for line in exact)
    again = interrupt(tmp_path / "float16", tmp_path / "again", 2)
    assert saved_scales(again) == [[INIT_EXPONENT - BACKOFF_EXPONENT, 2]], "it fell, or the test shows nothing"
    run(CONFIG, *overrides(ground.folder, again, **HALF))
    assert result(again) == result(tmp_path / "float16")


@pytest.mark.matrix
def test_replicas_keep_their_own_scales(ground: Playground, tmp_path: Path) -> None:
    options = {**HALF, "distributed.strategy": "ddp", "distributed.sync_every": 4}
    assert ground.codes("float16 apart", 2, **options) == [0, 0]
    whole = ground.run_dir("float16 apart")
    assert saved_scales(whole) == 2 * [[INIT_EXPONENT - BACKOFF_EXPONENT, 2]]
    again = interrupt(whole, ground.run_dir("float16 apart again"), 2)
    assert ground.codes("float16 apart again", 2, **options) == [0, 0]
    assert result(again) == result(whole)
    other = interrupt(whole, ground.run_dir("float16 apart, other scales"), 2)
    folder = other / "checkpoints" / "step-2"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"loss_scale": [[7, 2], [5, 3]]}))
    names = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps({name: file_sha256(folder / name) for name in names}, indent=1))
    assert ground.codes("float16 apart, other scales", 2, **options) == [0, 0]
    assert saved_scales(other, 4) == [[7, 4], [5, 5]]
