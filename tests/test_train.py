"""The main job as a user starts it: configs/llama7b.yaml on a small real checkpoint and real data."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from accelerate.tracking import TensorBoardTracker
from conftest import shared
from runs import ACCELERATE, CONFIG, PLAIN, TINY, Finished, gsm8k_overrides, start
from safetensors.torch import load_file, save_file
from small_runs import WORLDS, Playground, timeless

from sora_llm import checkpoint, cli
from sora_llm.config import load_config
from sora_llm.errors import RunFailed, UserError
from sora_llm.running import assembly, optimizer_step, run_state
from sora_llm.running.job import Job
from sora_llm.train import main, run, start_trackers

SHORT = {"train.max_steps": 12, "output.save_steps": 6, "output.logging_steps": 4}


@pytest.fixture(scope="module")
def zero2(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """NF4 under ZeRO-2 on two processes, as `accelerate launch --num_processes 2 --multi_gpu` starts it."""
    directory = tmp_path_factory.mktemp("zero2") / "run"
    overrides = gsm8k_overrides(
        directory,
        **{"evaluation.eval_steps": 20, "output.logging_steps": 5, "evaluation.sample_prompts": ["How many?"]},
    )
    launcher = (*ACCELERATE, "--num_processes", "2", "--multi_gpu", "-m", "sora_llm.train")
    return start(launcher, [CONFIG, *overrides], directory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same with no launcher flag and no accelerate config: one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    overrides = gsm8k_overrides(directory, **SHORT)
    return start((*ACCELERATE, "-m", "sora_llm.train"), [CONFIG, *overrides], directory)


def test_two_processes_run_zero2_and_finish(zero2: Finished) -> None:
    assert zero2.returncode == 0, zero2.output
    assert zero2.json("status.json") == {
        "state": "finished",
        "step": 30,
        "phase": "done",
        "checkpoint": "checkpoints/step-30",
        "adapter": "adapter",
        "error": None,
    }
    env = zero2.json("env.json")
    assert (env["strategy"], env["num_processes"], env["zero_stage"]) == ("zero2", 2, 2)
    assert "TOKEN" not in json.dumps(env).upper()


def test_the_dev_loss_falls_and_ranks_are_pruned(zero2: Finished) -> None:
    metrics, ranks = zero2.lines("metrics.jsonl"), zero2.lines("ranks.jsonl")
    assert metrics[0]["step"] == 0 and "loss" not in metrics[0]
    assert metrics[-1]["eval_loss"] < metrics[0]["eval_loss"] - 1
    exported = ranks[-1]["ranks"]
    assert len(exported) == 35 and 0 < sum(exported.values()) < 35 * 64
    assert metrics[-1]["mean_rank"] < 64


def test_metrics_keep_the_contract(zero2: Finished) -> None:
    metrics = zero2.lines("metrics.jsonl")
    losses = [line["step"] for line in metrics if "loss" in line]
    assert losses == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [0, 20, 30]
    assert all(value is not None for line in metrics for value in line.values())
    logged = metrics[2]
    for field in ("learning_rate", "gate_learning_rate", "grad_norm", "lambda", "kept_params", "tokens_per_second"):
        assert logged[field] >= 0
    epochs = [line["epoch"] for line in metrics if "loss" in line]
    assert epochs == pytest.approx([epochs[-1] * step / 30 for step in losses]) and 0 < epochs[-1] < 1
    assert {line["phase"] for line in metrics} == {"dense", "sparsify", "export"}


def test_ranks_are_logged_in_the_sparsify_phase_and_after_the_cut(zero2: Finished) -> None:
    lines = zero2.lines("ranks.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30, 30]
    certificate = zero2.json("adapter/certificate.json")
    assert lines[-1]["ranks"] == {name: module["rank"] for name, module in certificate["modules"].items()}


def test_peft_reloads_the_export_with_the_loss_that_the_run_reported(zero2: Finished) -> None:
    """In a process of its own, through `sora-llm evaluate`: base and adapter come from disk."""
    last = zero2.lines("metrics.jsonl")[-1]
    assert last["eval_loss_exported"] == pytest.approx(last["eval_loss"], rel=1e-3)  # PEFT's branch is float32
    launcher = (PLAIN[0], "-m", "sora_llm", "evaluate")
    arguments = [CONFIG, *gsm8k_overrides(zero2.directory), "--adapter", str(zero2.directory / "adapter"), "--json"]
    result = start(launcher, arguments, zero2.directory)
    assert result.returncode == 0, result.output
    measured = json.loads(result.stdout)
    # one process makes other batches of the rows than two, and bf16 rounds at 2⁻⁹ (seen: 2e-5 of either mean loss)
    assert measured["adapter"]["loss"] == pytest.approx(last["eval_loss_exported"], rel=1e-4)
    assert measured["base"]["loss"] == pytest.approx(zero2.lines("metrics.jsonl")[0]["eval_loss"], rel=1e-4)


def test_the_certificate_is_of_the_file_beside_it(zero2: Finished) -> None:
    adapter = zero2.directory / "adapter"
    certificate = zero2.json("adapter/certificate.json")
    assert certificate["passed"] and certificate["layout"] == "padded"
    assert certificate["sha256"] == hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert all(tensor.dtype == torch.float32 for tensor in load_file(adapter / "adapter_model.safetensors").values())
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (adapter / name).read_bytes() == (shared("models/stories260k") / name).read_bytes()


def test_sample_prompts_are_answered_by_base_and_adapter(zero2: Finished) -> None:
    (sample,) = zero2.lines("samples.jsonl")
    assert sample["prompt"] == "How many?" and sample["base"] != sample["adapted"]


def test_trackers_get_the_metrics(zero2: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((zero2.directory / "trackers").rglob("events.*")).parent)).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == [5, 10, 15, 20, 25, 30]


def test_no_launcher_flag_is_one_process(alone: Finished) -> None:
    assert alone.returncode == 0, alone.output
    env = alone.json("env.json")
    assert (env["strategy"], env["num_processes"]) == ("none", 1) and "zero_stage" not in env


def test_a_finished_run_says_so_and_changes_nothing(alone: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = _snapshot(alone.directory)
    assert main([CONFIG, *gsm8k_overrides(alone.directory, **SHORT)]) == 0
    assert "is already finished" in capsys.readouterr().out
    assert _snapshot(alone.directory) == before


def test_another_config_is_refused_by_name_also_on_a_finished_run(alone: Finished) -> None:
    before = _snapshot(alone.directory)
    with pytest.raises(UserError, match=r"sora\.lora_alpha"):
        run(CONFIG, *gsm8k_overrides(alone.directory, **{"train.max_steps": 12, "sora.lora_alpha": 32}))
    with pytest.raises(UserError, match="not empty"):
        run(CONFIG, *gsm8k_overrides(alone.directory, **{"train.max_steps": 12, "output.resume": "never"}))
    assert _snapshot(alone.directory) == before


@pytest.mark.matrix
def test_the_saved_config_repeats_the_run(alone: Finished, tmp_path: Path) -> None:
    resolved = yaml.safe_load((alone.directory / "config.yaml").read_text())
    assert resolved["distributed"]["strategy"] == "none"
    assert resolved["sora"]["threshold"] == "decoupled" and resolved["sora"]["dtype"] == "float32"
    assert isinstance(resolved["sora"]["gate_lr"], float)
    repeat = start(
        PLAIN, [str(alone.directory / "config.yaml"), f"output.output_dir={tmp_path / 'again'}"], tmp_path / "again"
    )
    assert repeat.returncode == 0, repeat.output
    first, second = (d / "adapter" / "adapter_model.safetensors" for d in (alone.directory, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_an_interrupted_run_goes_on_from_its_newest_checkpoint(alone: Finished, tmp_path: Path) -> None:
    """The state after step 6 is put into a new directory, with metrics of steps that never got a checkpoint."""
    import shutil

    directory = tmp_path / "resumed"
    shutil.copytree(alone.directory, directory)
    shutil.rmtree(directory / "checkpoints" / "step-12")
    shutil.rmtree(directory / "adapter")
    status = run_state.read_status(directory)
    assert status is not None
    (directory / "status.json").write_text(json.dumps({**status, "state": "running"}))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "ph')  # torn
    resumed = start(PLAIN, [CONFIG, *gsm8k_overrides(directory, **SHORT)], directory)
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.output
    for name in ("adapter/adapter_model.safetensors", "ranks.jsonl"):
        assert (directory / name).read_bytes() == (alone.directory / name).read_bytes()
    assert timeless(resumed.lines("metrics.jsonl")) == timeless(alone.lines("metrics.jsonl"))


def test_a_dry_run_reports_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "dry"
    assert main([CONFIG, *gsm8k_overrides(directory), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("trainable parameters", "optimizer state", "supervised", "30 of 2 packed sequences"):
        assert words in said
    assert not directory.exists()


def test_print_config_prints_every_key_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CONFIG, "--print-config", "sora.r=32"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (
        shown["sora"]["r"] == 32 and shown["distributed"]["check_every"] == 100 and shown["model"]["revision"] is None
    )


def test_a_fully_pruned_adapter_is_an_explained_failure_whose_checkpoint_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "empty"
    options = {"train.max_steps": 8, "sora.threshold": "constant", "sora.sparse_lambda": 5.0, "output.report_to": []}
    assert main([CONFIG, *gsm8k_overrides(directory, **options)]) == 1
    complaints = capsys.readouterr().err
    assert "every rank" in complaints and "Traceback" not in complaints
    status = json.loads((directory / "status.json").read_text())
    assert (
        status["state"] == "failed" and "every rank" in status["error"] and status["checkpoint"] == "checkpoints/step-8"
    )
    assert not (directory / "adapter").exists()
    options["output.allow_empty_adapter"] = True
    assert main([CONFIG, *gsm8k_overrides(directory, **options)]) == 0
    last = json.loads((directory / "ranks.jsonl").read_text().splitlines()[-1])
    assert set(last["ranks"].values()) == {0}


@pytest.mark.parametrize(
    ("trackers", "project", "named"),
    [
        (["wandb"], "mine", "mine"),
        (["wandb"], None, "sora_llm"),
        (["tensorboard"], "mine", "sora_llm"),
        (["wandb", "tensorboard"], "mine", "sora_llm"),
    ],
)
def test_the_project_of_wandb_is_the_one_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trackers: list[str], project: str | None, named: str
) -> None:
    if project is None:
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
    else:
        monkeypatch.setenv("WANDB_PROJECT", project)
    config = load_config(CONFIG, gsm8k_overrides(tmp_path, **{"output.report_to": trackers}))
    found: list[str] = []
    accelerator = SimpleNamespace(init_trackers=lambda name, **_: found.append(name))
    start_trackers(cast(Job, SimpleNamespace(config=config, accelerator=accelerator)), tmp_path)
    assert found == [named]


def test_a_base_with_numbers_that_are_none_is_named_as_the_reason(tmp_path: Path, stories: Path) -> None:
    shutil.copytree(stories, tmp_path / "base")
    tensors = load_file(stories / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    (tmp_path / "base" / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    options = {
        "model.name_or_path": str(tmp_path / "base"),
        "data.sample_packing": False,  # whose check would say it
        "output.report_to": [],
        "train.max_steps": 2,
    }
    with pytest.raises(RunFailed, match="the dev loss before training is nan: the weights of the base are damaged"):
        run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))


def test_a_tracker_that_cannot_end_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(_: TensorBoardTracker) -> None:
        raise ConnectionError("it is gone")

    monkeypatch.setattr(TensorBoardTracker, "finish", finish)
    before = dict(os.environ)
    result = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **{"train.max_steps": 2}))
    assert result.status["state"] == "finished" and dict(os.environ) == before
    assert "warning: output.report_to: tensorboard could not be ended: it is gone" in capsys.readouterr().out


def test_completions_and_conversations_train_too(tmp_path: Path) -> None:
    """`run` for pipelines, in this process: two data sets of other types, ragged layout."""
    wikisql, sharegpt = shared("data/mlx_wikisql_train.jsonl"), shared("data/fastchat_dummy_conversation.json")
    datasets = [{"path": str(wikisql), "type": "completion"}, {"path": str(sharegpt), "type": "sharegpt"}]
    options = {
        "data.datasets": datasets,
        "train.max_steps": 4,
        "output.report_to": [],
        "output.export_layout": "ragged",
        "sora.r": 8,
    }
    result = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    assert result.status["state"] == "finished" and result.adapter == tmp_path / "run" / "adapter"
    assert result.metrics["step"] == 4 and result.metrics["eval_loss"] > 0
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["rank_pattern"]


def _snapshot(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_rows_that_are_left_out_for_their_length_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run"), "data.sequence_len=256", "--dry-run"]) == 0
    assert "warning: 73% of the rows are longer than data.sequence_len 256" in capsys.readouterr().out


def test_the_card_says_how_the_base_was_loaded_and_the_adapter_trained(zero2: Finished) -> None:
    card = (zero2.directory / "adapter" / "README.md").read_text()
    config = yaml.safe_load((zero2.directory / "config.yaml").read_text())
    said = yaml.safe_load(card.partition("## Training\n```yaml\n")[2].partition("```")[0])
    assert said["sora"] == config["sora"] and said["train"] == config["train"] and "datasets" not in said["data"]
    assert re.search(r"^# \d+ packed sequences a step, from 2 processes$", card, re.M)
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"' in card


def test_a_flag_for_a_key_gets_advice(capsys) -> None:
    assert main([CONFIG, "--train.max_steps=5"]) == UserError.exit_code
    assert "overrides have no dashes" in capsys.readouterr().err
    assert main([CONFIG, "--dry-rum"]) == UserError.exit_code
    error = capsys.readouterr().err
    assert "did you mean --dry-run?" in error and "overrides" not in error


def test_the_peak_of_memory_is_that_of_the_engine_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, too, a run on the CPU has resident memory."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30 if device.index == 1 else 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    assert optimizer_step.peak_memory_gib(torch.device("cpu")) > 0.1  # this process with torch in it
    assert optimizer_step.peak_memory_gib(torch.device("cuda", 1)) == 3
    optimizer_step.forget_peak(torch.device("cpu"))
    optimizer_step.forget_peak(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


def test_peaks_of_memory_begin_with_every_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and cutting are in none of them, which under DeepSpeed's engines alone they were not."""
    happened: list[str] = []

    class Noted(assembly.Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            happened.append("engine")

    monkeypatch.setattr(assembly, "Engine", Noted)
    monkeypatch.setattr(assembly, "forget_peak", lambda device: happened.append(device.type))
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **{"train.max_steps": 4, "sora.consensus_at": 0.5}))
    assert happened == ["engine", "cpu"] * 2, "at the start and at the cut"


def test_a_tracker_that_cannot_be_started_is_a_sentence(tmp_path):
    def refuse(*_, **__):
        raise ValueError("api_key not configured\n(no tty)")

    config = load_config("configs/demo.yaml", ["output.report_to=[wandb]"])
    job = SimpleNamespace(accelerator=SimpleNamespace(init_trackers=refuse), config=config)
    with pytest.raises(RunFailed, match=r"report_to wandb could not be started: api_key not configured; fix it"):
        start_trackers(job, tmp_path)


def test_a_run_without_dev_rows_knows_how_large_it_was(tmp_path, capsys):
    """Its first line is of a step when gates had been cut already."""
    options = {
        **TINY,
        "sora.target_rank": 2,
        "sora.sparse_lambda": None,
        "sora.consensus_at": 0.75,
        "sora.dense_ratio": 0.25,
    }
    options |= {"train.max_steps": 8, "output.logging_steps": 8}
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mean_rank_before"] == pytest.approx(4) and told["mean_rank"] <= 2
    assert told["kept_params"] <= told["all_params"] / 2 and told["stored_params"] >= told["kept_params"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_optimizer_is_the_one_of_the_config(ground: Playground, undisturbed: dict[int, Path], num_processes: int):
    """After one step from zero moments, v / m² = (1 - β₂) / (1 - β₁)² and B = -lr · g / (|g| + ε), whatever g is.

    A and gate have no gradient yet, since B was 0: A is smaller by lr · weight_decay, which is not for gates."""
    name, rate, epsilon, decay = f"adam{num_processes}", 0.01, 1e-3, 0.5
    options = {
        "train.adam_beta1": 0.5,
        "train.adam_beta2": 0.75,
        "train.adam_epsilon": epsilon,
        "train.weight_decay": decay,
        "train.learning_rate": rate,
        "train.lr_scheduler_type": "constant",
        "train.warmup_ratio": 0,
        "train.max_steps": 4,
        "evaluation.eval_steps": None,
        "output.save_steps": 1,
        **WORLDS[num_processes],
    }
    assert ground.codes(name, num_processes, **options) == [0] * num_processes
    tensors = checkpoint.read_tensors(ground.run_dir(name) / "checkpoints" / "step-1")
    factors = [key for key in tensors if key.endswith("lora_B")]
    assert factors
    for key in factors:
        B, m, v = (tensors[key + suffix].double() for suffix in ("", ".exp_avg", ".exp_avg_sq"))
        torch.testing.assert_close(v, m**2, rtol=1e-5, atol=1e-30)  # (1 - 0.75) / (1 - 0.5)²
        gradient = m / 0.5
        torch.testing.assert_close(B, -rate * gradient / (gradient.abs() + epsilon), rtol=1e-5, atol=1e-9)
    start = checkpoint.read_tensors(undisturbed[num_processes] / "checkpoints" / "step-1")  # of the same seed, no decay
    for key in (key.replace("lora_B", "lora_A") for key in factors):
        torch.testing.assert_close(tensors[key], start[key] * (1 - rate * decay), rtol=1e-6, atol=0)  # float32 rounding
    gates = [tensor for key, tensor in tensors.items() if key.endswith(".gate")]
    assert gates and all(torch.equal(gate, torch.ones_like(gate)) for gate in gates)


def test_a_dry_run_measures_its_step(tmp_path):
    line = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **TINY), dry_run=True).metrics
    assert line["step_seconds"] > 1e-3 and line["tokens_per_second"] < 1e6


def test_the_template_that_was_used_goes_with_the_adapter(tmp_path):
    """stories260k has no chat template: the default one renders the conversations, and a client must know it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": str(n)}) + "\n" for n in range(8)))
    options = {**TINY, "data.datasets": [{"path": str(rows), "type": "alpaca"}], "train.max_steps": 2}
    adapter = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options)).adapter
    assert adapter is not None
    assert "### Instruction" in (adapter / "chat_template.jinja").read_text()
    assert "chat_template.jinja" in (adapter / "README.md").read_text()


def test_prompts_and_completions_need_no_template(alone: Finished):
    assert not (alone.directory / "adapter" / "chat_template.jinja").exists()
