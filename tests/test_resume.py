"""Whose checkpoint a run goes on from, and that a process can run more than once."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from runs import gsm8k_overrides

from sora_llm import checkpoint
from sora_llm.errors import UserError
from sora_llm.train import run

CONFIG = "configs/llama7b.yaml"
TINY = {"train.max_steps": 4, "output.save_steps": 2, "output.report_to": [], "sora.r": 4, "data.val_set_size": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4; tests work on copies."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(CONFIG, *gsm8k_overrides(directory, **TINY))
    return directory


def _copy(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def test_a_checkpoint_of_another_config_is_refused_even_without_the_files_beside_it(finished, tmp_path):
    directory = _copy(finished, tmp_path / "run")
    for name in ("config.yaml", "env.json", "status.json"):
        (directory / name).unlink()
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"sora\.lora_alpha"):
        run(CONFIG, *gsm8k_overrides(directory, **TINY, **{"sora.lora_alpha": 99}))
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_checkpoint_of_other_data_is_refused(finished, tmp_path):
    directory = _copy(finished, tmp_path / "run")
    (directory / "status.json").unlink()
    for folder in (directory / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        tensors = checkpoint.read_tensors(folder)
        state["data"]["rows"] += 1
        checkpoint.save(directory, state.pop("step"), tensors, state)
    with pytest.raises(UserError, match="the data is not what"):
        run(CONFIG, *gsm8k_overrides(directory, **TINY))


def test_a_run_that_waited_for_the_lock_of_one_that_finished_changes_nothing(finished, tmp_path):
    """The second start looks at the directory before the first has written anything, then waits."""
    directory = tmp_path / "run"
    lock = checkpoint.run_lock(directory)
    lock.__enter__()
    results: list[object] = []
    second = threading.Thread(target=lambda: results.append(run(CONFIG, *gsm8k_overrides(directory, **TINY))))
    second.start()
    while second.is_alive() and not (directory / ".lock").exists():
        pass
    import shutil
    import time

    time.sleep(10)  # it is past its first look by now, or it finds the finished run at once: the result is the same
    shutil.copytree(finished, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    lock.__exit__(None, None, None)
    second.join(timeout=120)
    assert results and results[0].status["state"] == "finished"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_explicit_checkpoint_is_where_the_run_starts(finished, tmp_path):
    directory = tmp_path / "branch"
    start = finished / "checkpoints" / "step-2"
    result = run(CONFIG, *gsm8k_overrides(directory, **TINY, **{"output.resume": str(start)}))
    first, second = (folder / "adapter" / "adapter_model.safetensors" for folder in (finished, directory))
    assert first.read_bytes() == second.read_bytes() and result.metrics["step"] == 4
    assert "resume: auto" in (directory / "config.yaml").read_text()  # repeating it does not need that checkpoint


def test_the_environment_is_as_it_was_after_a_run_and_other_strategies_can_follow(tmp_path):
    before = dict(os.environ)
    for number, strategy in enumerate(("zero2", "none", "zero2", "ddp")):
        options = {**TINY, "train.max_steps": 2, "distributed.strategy": strategy}
        run(CONFIG, *gsm8k_overrides(tmp_path / str(number), **options))
        assert dict(os.environ) == before
        assert json.loads((tmp_path / str(number) / "env.json").read_text())["strategy"] == strategy


def test_the_template_that_was_used_goes_with_the_adapter(tmp_path):
    """stories260k has no chat template: the default one renders the conversations, and a client must know it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": str(n)}) + "\n" for n in range(8)))
    options = {**TINY, "data.datasets": [{"path": str(rows), "type": "alpaca"}], "train.max_steps": 2}
    adapter = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options)).adapter
    assert adapter is not None
    assert "### Instruction" in (adapter / "chat_template.jinja").read_text()
    assert "chat_template.jinja" in (adapter / "README.md").read_text()


def test_prompts_and_completions_need_no_template(finished):
    assert not (finished / "adapter" / "chat_template.jinja").exists()
