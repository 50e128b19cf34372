"""A sparsity path (Algorithm 1): stages of rising λ in one run, an adapter of each, resumed wherever it was."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import CONFIG
from safetensors.torch import load_file
from small_runs import Playground, interrupt, lines, overrides, result

from sora_llm import cli
from sora_llm.artifacts.lora_files import read_lora
from sora_llm.config import load_config
from sora_llm.errors import Preempted, UserError
from sora_llm.running import metrics
from sora_llm.running.early_stopping import EarlyStopping
from sora_llm.running.plan import make_plan
from sora_llm.running.training import Training
from sora_llm.topology import ALONE
from sora_llm.train import run

STEPS, LAMBDAS = 4, [0.2, 0.5, 0.8]
PATH: dict[str, Any] = {
    "sora.target_rank": None,
    "sora.sparse_lambda": LAMBDAS[0],
    "sora.max_lambda": LAMBDAS[-1],
    "sora.lambda_num": len(LAMBDAS),
    "sora.lambda_schedule": "linear",
    "sora.consensus": "slots",
    "sora.consensus_at": 1.0,
    "sora.dense_ratio": 0.25,
    "sora.gate_lr": 0.5,
    "sora.lora_dropout": 0.0,
    "train.max_steps": STEPS,
    "train.warmup_ratio": 0.0,
    "evaluation.eval_steps": 2,
    "output.save_steps": 1,
}


@pytest.fixture(scope="module")
def straight(ground: Playground) -> Path:
    """The directory of an undisturbed path in one process."""
    assert ground.codes("path", **PATH) == [0]
    return ground.run_dir("path")


def test_every_stage_leaves_an_adapter_of_its_own_and_the_last_one_is_the_runs(straight: Path) -> None:
    assert sorted(folder.name for folder in (straight / "path").iterdir()) == ["0.2", "0.5", "0.8"]
    metrics = lines(straight, "metrics.jsonl")
    exports = [line for line in metrics if line["phase"] == "export"]
    assert [(line["step"], line["stage"], line["sparse_lambda"]) for line in exports] == [
        (STEPS * (number + 1), number, pytest.approx(value)) for number, value in enumerate(LAMBDAS)
    ]
    kept = [line["kept_params"] for line in exports]
    assert kept[0] > kept[1] > kept[2] > 0
    for line in exports:
        certificate = json.loads((straight / "path" / f"{line['sparse_lambda']:.6g}" / "certificate.json").read_text())
        assert certificate["passed"]
        assert line["eval_loss"] == pytest.approx(line["eval_loss_exported"], rel=1e-5) and line["train_loss"] > 0
    for file in (straight / "path" / "0.8").iterdir():
        assert (straight / "adapter" / file.name).read_bytes() == file.read_bytes()
    assert all("stage" in line for line in metrics + lines(straight, "ranks.jsonl"))


def test_every_stage_has_its_own_schedule_and_goes_on_from_uncut_weights(straight: Path) -> None:
    steps = [line for line in lines(straight, "metrics.jsonl") if "learning_rate" in line]
    assert [line["step"] for line in steps] == list(range(1, 3 * STEPS + 1))
    rates = [line["learning_rate"] for line in steps]
    assert rates[:STEPS] == rates[STEPS : 2 * STEPS] == rates[2 * STEPS :] and rates[0] > rates[STEPS - 1]
    assert [line["lambda"] for line in steps] == pytest.approx([0.0, *[0.2] * 3, *[0.5] * 4, *[0.8] * 4])
    assert [line["phase"] for line in steps] == ["dense"] + ["sparsify"] * (3 * STEPS - 1)
    tensors = load_file(straight / "checkpoints" / f"step-{3 * STEPS}" / "adapter.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".gate")} == {4}
    state = json.loads((straight / "checkpoints" / f"step-{STEPS + 1}" / "state.json").read_text())
    assert state["optimizer_steps"] == 1, "a fresh optimizer"


MIDDLE = {"linear": 0.5, "log_linear": math.log((math.exp(0.2) + math.exp(0.8)) / 2), "exp_linear": 0.4}
"""The second of three λ from 0.2 to 0.8."""


@pytest.mark.parametrize("schedule", MIDDLE)
def test_stages_are_planned_with_the_lambdas_of_the_schedule(schedule: str) -> None:
    config = load_config(CONFIG, overrides(Path(), Path(), **{**PATH, "sora.lambda_schedule": schedule}))
    plan = make_plan(config, "none", ALONE, lambda epochs: 0, {"q_proj": (8, 8)})
    assert [stage.sparse_lambda for stage in plan.stages] == [0.2, pytest.approx(MIDDLE[schedule]), 0.8]


def test_a_run_prunes_and_exports_with_the_lambdas_of_the_schedule(ground: Playground, tmp_path: Path) -> None:
    options = {**PATH, "sora.lambda_schedule": "log_linear", "train.max_steps": 1, "sora.dense_ratio": 0.0}
    run(CONFIG, *overrides(ground.folder, tmp_path / "run", **options))
    metrics, middle = lines(tmp_path / "run", "metrics.jsonl"), pytest.approx(MIDDLE["log_linear"])
    assert [line["sparse_lambda"] for line in metrics if line["phase"] == "export"] == [0.2, middle, 0.8]
    _, *pruned = [line["lambda"] for line in metrics if "learning_rate" in line]  # the first step has learned nothing
    assert pruned == [middle, 0.8]
    folders = sorted(folder.name for folder in (tmp_path / "run" / "path").iterdir())
    assert folders == ["0.2", f"{MIDDLE['log_linear']:.6g}", "0.8"]


@pytest.mark.parametrize(("dense_ratio", "is_one"), [(0.0, True), (0.25, False)])
def test_the_rate_of_all_stages_is_filled_in_where_there_is_one(dense_ratio: float, is_one: bool) -> None:
    changed = {**PATH, "sora.gate_lr": "auto", "sora.dense_ratio": dense_ratio, "train.max_steps": 40}
    config = load_config(CONFIG, overrides(Path(), Path(), **changed))
    plan = make_plan(config, "none", ALONE, lambda epochs: 0, {"q_proj": (8, 8)})
    rates = {stage.gate_lr for stage in plan.stages}
    assert (len(rates) == 1) is is_one
    assert plan.config.sora.gate_lr == (rates.pop() if is_one else "auto")


@pytest.mark.parametrize(
    "step",
    [
        STEPS,
        2 * STEPS + 1,
        *(pytest.param(step, marks=pytest.mark.matrix) for step in (2, STEPS + 1, 2 * STEPS, 3 * STEPS - 1)),
    ],
)
def test_an_interrupted_path_ends_with_the_bits_of_one_that_was_not(
    step: int, straight: Path, ground: Playground, tmp_path: Path
) -> None:
    run_dir = interrupt(straight, tmp_path / "run", step)
    for number, value in enumerate(LAMBDAS):  # what a run that died there has not exported yet, or has just
        if STEPS * (number + 1) > step:
            shutil.rmtree(run_dir / "path" / f"{value:.6g}")
    run(CONFIG, *overrides(ground.folder, run_dir, **PATH))
    assert result(run_dir) == result(straight)
    for value in LAMBDAS:
        name = Path("path", f"{value:.6g}", "adapter_model.safetensors")
        assert (run_dir / name).read_bytes() == (straight / name).read_bytes()


def test_a_later_stage_is_not_gone_on_with_in_another_directory(
    straight: Path, ground: Playground, tmp_path: Path
) -> None:
    """Which would lack the adapters of the stages before."""
    elsewhere = {"output.resume": str(straight / "checkpoints" / f"step-{STEPS + 1}")}
    with pytest.raises(UserError, match="from a later stage"):
        run(CONFIG, *overrides(ground.folder, tmp_path / "run", **PATH, **elsewhere))


def test_a_folder_that_no_stage_may_replace_is_said_before_training(ground: Playground, tmp_path: Path) -> None:
    mine = tmp_path / "run/path" / f"{LAMBDAS[1]:.6g}"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"path/0\.5 exists and is not an export"):
        run(CONFIG, *overrides(ground.folder, tmp_path / "run", **PATH))
    assert (mine / "notes.txt").read_text() == "mine" and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.matrix)])
def test_several_processes_walk_the_same_path(strategy: str, straight: Path, ground: Playground) -> None:
    name = f"path {strategy}"
    assert ground.codes(name, 2, **PATH, **{"distributed.strategy": strategy}) == [0, 0]
    ours, theirs = (lines(folder, "ranks.jsonl") for folder in (ground.run_dir(name), straight))
    assert ours == theirs


def test_a_path_of_local_updates_with_momentum_begins_every_stage_without_it(ground: Playground) -> None:
    local = {"distributed.sync_every": 2, "distributed.outer_momentum": 0.5, "sora.lambda_num": 2}
    assert ground.codes("path in rounds", **{**PATH, **local}) == [0]
    run_dir = ground.run_dir("path in rounds")
    exports = [line for line in lines(run_dir, "metrics.jsonl") if line["phase"] == "export"]
    assert [line["stage"] for line in exports] == [0, 1]
    held = {
        step: any("velocity" in name for name in load_file(run_dir / f"checkpoints/step-{step}/adapter.safetensors"))
        for step in (STEPS - 1, STEPS + 1, STEPS + 2)
    }
    assert held == {STEPS - 1: True, STEPS + 1: False, STEPS + 2: True}, "none until the stage's first round ends"


def test_a_path_stopped_in_the_first_evaluation_of_a_stage_keeps_the_line_of_the_stage_before(
    straight: Path, ground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is logged after the resume; the line before it is of an adapter that is not exported again."""
    options = {**PATH, "evaluation.eval_steps": STEPS + 1}
    measured = metrics.measure

    def interrupted(of: Training) -> float:
        if of.done == STEPS + 1:
            raise Preempted("SIGTERM")
        return measured(of)

    monkeypatch.setattr(metrics, "measure", interrupted)
    assert run(CONFIG, *overrides(ground.folder, tmp_path / "run", **options)).status["state"] == "preempted"
    monkeypatch.setattr(metrics, "measure", measured)
    assert run(CONFIG, *overrides(ground.folder, tmp_path / "run", **options)).status["state"] == "finished"
    for name in ("metrics.jsonl", "ranks.jsonl"):
        found = [(line["step"], line.get("phase")) for line in lines(tmp_path / "run", name)]
        assert found == [(line["step"], line.get("phase")) for line in lines(straight, name)]
    (line,) = (line for line in lines(tmp_path / "run", "metrics.jsonl") if line["step"] == STEPS + 1)
    assert "loss" in line and line.get("tokens_per_second") != 0


def test_without_retraining_later_stages_only_prune(ground: Playground, tmp_path: Path) -> None:
    """As the released script does, whose schedulers are spent after the first stage."""
    options = {**PATH, "sora.threshold": "constant", "sora.retrain": False, "sora.sparse_lambda": 0.01}
    options |= {"sora.max_lambda": 0.05, "output.save_steps": STEPS}
    run(CONFIG, *overrides(ground.folder, tmp_path / "run", **options))
    steps = [line for line in lines(tmp_path / "run", "metrics.jsonl") if "learning_rate" in line]
    assert all(line["learning_rate"] > 0 for line in steps[: STEPS - 1])
    assert (
        {line["learning_rate"] for line in steps[STEPS:]}
        == {0.0}
        == {line["gate_learning_rate"] for line in steps[STEPS:]}
    )
    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "adapter.safetensors") for step in (8, 12)
    )
    moved = [name for name in before if "exp_avg" not in name and not before[name].equal(after[name])]
    assert moved and all(name.endswith(".gate") for name in moved), "factors stay, gates shrink"


def test_patience_ends_stages_early(ground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PATH, "evaluation.eval_steps": 1, "evaluation.early_stopping_patience": 1, "train.max_steps": 8}
    monkeypatch.setattr(EarlyStopping, "update", _after_three())
    run(CONFIG, *overrides(ground.folder, tmp_path / "run", **options))
    exports = [line for line in lines(tmp_path / "run", "metrics.jsonl") if line["phase"] == "export"]
    assert [(line["stage"], line["step"]) for line in exports] == [(0, 5), (1, 8), (2, 11)], "dense steps do not count"
    assert len(list((tmp_path / "run" / "path").iterdir())) == 3


def _after_three() -> Callable[[EarlyStopping, float], bool]:
    calls = 0

    def update(patience: EarlyStopping, _loss: float) -> bool:
        nonlocal calls
        calls += 1
        return calls % 3 == 0

    return update


def test_patience_counts_evaluations_without_a_better_one() -> None:
    patience = EarlyStopping(2)
    assert [patience.update(loss) for loss in (3.0, 2.0, 2.0, 1.9, 2.5, 2.4)] == [False] * 5 + [True]
    again = EarlyStopping(2)
    again.load(patience.state())
    assert again.update(2.0)
    patience.reset()
    assert not patience.update(9.0) and not EarlyStopping(None).update(1.0)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    patience = EarlyStopping(2)
    assert [patience.update(loss) for loss in (math.nan, 3.0, 2.0, math.nan, 1.0)] == [False] * 5
    assert patience.is_better(0.9) and not patience.is_better(math.nan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sora.max_lambda": None}, "max_lambda"),
        ({"sora.max_lambda": 0.1}, "must be above"),
        ({"sora.lambda_schedule": "constant"}, "is one λ"),
        ({"sora.lambda_schedule": "exp_linear", "sora.sparse_lambda": 0.0}, "must be above 0"),
        ({"sora.consensus_at": 0.5}, "must be 1.0 in a sparsity path"),
        ({"sora.retrain": False}, "needs sora.threshold constant"),
        ({"sora.sparse_lambda": None, "sora.target_rank": 2}, "whose stages have a λ each"),
        ({"sora.lambda_num": 1}, "needs a sparsity path"),
        ({"sora.lambda_num": 10**6}, "too close together"),
        (
            {
                "sora.lambda_num": 1,
                "sora.max_lambda": None,
                "sora.lambda_schedule": "constant",
                "evaluation.early_stopping_patience": 2,
            },
            "ends the finetune phase",
        ),
        ({"evaluation.early_stopping_patience": 2, "evaluation.eval_steps": None}, "set evaluation.eval_steps"),
    ],
)
def test_paths_that_cannot_be_are_a_sentence(
    options: dict[str, Any], said: str, ground: Playground, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run(CONFIG, *overrides(ground.folder, tmp_path / "run", **{**PATH, **options}))
    assert not (tmp_path / "run").exists()


def test_a_stage_is_exported_again_by_its_lambda_or_by_its_size(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = {
        f"{line['sparse_lambda']:.6g}": line for line in lines(straight, "metrics.jsonl") if line["phase"] == "export"
    }

    def export(*arguments: str) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert cli.main(["export", str(straight), *arguments, "--out", str(out), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    again = export("--stage", "0.5", "--layout", "ragged")
    ranks = {name: module["rank"] for name, module in again["certificate"]["modules"].items()}
    of_stage = [line for line in lines(straight, "ranks.jsonl") if line["step"] == 2 * STEPS][-1]["ranks"]
    assert (again["stage"], again["layout"], ranks) == ("0.5", "ragged", of_stage)
    ours, theirs = (read_lora(folder).factors for folder in (Path(again["adapter"]), straight / "path" / "0.5"))
    assert all(ours[name][0].equal(A) and ours[name][1].equal(B) for name, (A, B, _) in theirs.items() if len(A))
    assert export()["kept_params"] == exports["0.8"]["kept_params"], "the run's own adapter"
    limit = exports["0.5"]["kept_params"]
    best = min(("0.5", "0.8"), key=lambda name: exports[name]["eval_loss"])
    assert export("--max-params", str(limit))["stage"] == best


def test_a_stage_that_is_not_there_is_a_sentence(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run_dir: Path, *arguments: str) -> str:
        assert cli.main(["export", str(run_dir), *arguments, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "has no stage 0.3; it has 0.2, 0.5, 0.8" in refused(straight, "--stage", "0.3")
    assert "the smallest has" in refused(straight, "--max-params", "3")
    assert "is not a run directory" in refused(tmp_path)
    assert not (tmp_path / "out").exists()
