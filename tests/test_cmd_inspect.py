"""`sora-llm inspect`: the summary in the terminal, and the report it refreshes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from run_dirs import MadeUpRun, inspected

from sora_llm import cli
from sora_llm.commands.common import printable
from sora_llm.config import load_config, to_yaml
from sora_llm.report_page import read_record, write_page


def test_a_finished_run_is_told_in_short(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    shown = inspected(capsys, run.path)
    last = run.metrics[-1]
    assert shown.startswith(f"{run.path}: finished\n")
    assert re.search(r"^step +100 of 100, phase done$", shown, re.M)
    assert re.search(r"^dev loss +3.9000 → 1.5913, reloaded from disk 1.5915$", shown, re.M)
    assert (
        f"16.00 → {last['mean_rank']:.2f}" in shown and f"{last['kept_params']:,} of {run.full:,} parameters" in shown
    )
    assert re.search(r"^finetune +40 steps, 1,\d{3} tokens/s, peak 4.10 GiB$", shown, re.M)
    assert re.search(r"^time +0:40 in steps$", shown, re.M), "100 of 0.4 s"
    assert re.search(r"^self-check +passed, ΔW to 1.4e-15, logits to 5.6e-03$", shown, re.M)
    assert "no alarms" in shown and shown.rstrip().endswith(str(run.path / "report.html"))
    ranks = run.rank_lines[-1]["ranks"]
    for layer in range(2):
        cells = [str(rank or "-") for name, rank in ranks.items() if f".{layer}." in name]
        assert re.search(rf"^ +{layer} +{' +'.join(cells)}$", shown, re.M)
    assert (run.path / "report.html").exists() and not (run.path / "plots").exists()


def test_a_run_in_its_steps_says_how_long_they_took_and_what_is_left(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run", steps=20_000, every=1_000).train(until=0.25)
    run.json("env.json", {"total_steps": 20_000})
    run.write("running", phase="dense")
    record = read_record(run.path)
    assert (record.seconds_in_steps, record.seconds_left) == (pytest.approx(2_000), pytest.approx(6_000))
    assert "33:20 in steps, about 1:40:00 left, without" in write_page(record).read_text()
    elsewhere = replace(record, lines=record.lines[3:], config={"output": {"logging_steps": 1_000}})
    assert elsewhere.seconds_in_steps == pytest.approx(1_200), "the lines of 3,000 to 5,000, one of which is the first"
    for line in run.metrics:
        line.pop("step_seconds", None)
    run.write("running", phase="dense")
    record = read_record(run.path)
    assert record.seconds_in_steps is None and "in steps" not in write_page(record).read_text()


def test_tall_models_stand_in_blocks_where_there_is_room(tmp_path, capsys, monkeypatch):
    run = MadeUpRun(tmp_path / "run", 80).train()
    run.finish()
    for columns, num_blocks in ((40, 1), (100, 2), (200, 4)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = [line for line in inspected(capsys, run.path).splitlines() if re.match(r" +\d+ |layer", line)]
        assert lines[0].count("layer") == num_blocks and len(lines) == 1 + 80 // num_blocks
        assert all(len(line) <= columns for line in lines)
        shown = [cell for line in lines[1:] for block in line.split("|") for cell in block.split()[1:]]
        assert sorted(shown) == sorted(str(rank or "-") for rank in run.rank_lines[-1]["ranks"].values())


def test_json_has_the_same_and_writes_nothing(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run").train(alarms=[(10, "No gate is dying."), (15, "No gate is dying.")])
    run.finish()
    before = sorted(path.name for path in run.path.iterdir())
    content = json.loads(inspected(capsys, run.path, "--json"))
    assert sorted(path.name for path in run.path.iterdir()) == before
    assert (content["state"], content["step"], content["eval_loss"]) == ("finished", 100, 1.5913)
    assert content["alarms"] == [{"sentence": "No gate is dying.", "first_step": 10, "last_step": 15, "count": 2}]
    assert content["ranks"] == run.rank_lines[-1]["ranks"] and content["self_check"]["passed"] is True
    assert "report" not in content


def test_a_dev_loss_that_was_measured_once_is_no_progress(tmp_path, capsys):
    """A run that was stopped before its second evaluation looked as if it had learned nothing."""
    run = MadeUpRun(tmp_path / "run").train()
    for line in run.metrics[1:]:
        line.pop("eval_loss", None)
    run.write("preempted", phase="finetune")
    assert "3.9000 before; not measured since" in inspected(capsys, run.path)
    assert "before training; not measured since" in (run.path / "report.html").read_text()


def test_a_run_that_its_patience_ended_tells_of_what_was_planned_and_which_adapter_it_took(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run").train()
    env = json.loads((run.path / "env.json").read_text())
    run.json("env.json", env | {"total_steps": 250})
    run.finish(best_step=80)
    shown = inspected(capsys, run.path)
    assert re.search(r"^step +100 of 250, phase done$", shown, re.M)
    assert re.search(r"^adapter +adapter \(of step 80, the best dev loss, ", shown, re.M)
    found = json.loads(inspected(capsys, run.path, "--json"))
    assert (found["step"], found["total_steps"], found["best_step"]) == (100, 250, 80)
    assert "100 of 250" in (run.path / "report.html").read_text(encoding="utf-8")


def test_plots_are_drawn_on_request(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run", 1, 20, 5).train()
    run.finish()
    inspected(capsys, run.path, "--plots")
    assert (run.path / "plots" / "loss.png").exists()


def test_a_path_lists_its_stages(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run", 2, 20, 5)
    shown = inspected(capsys, run.path_of([0.1, 0.3, 1.0]))
    assert re.search(r"^λ 1 +[\d,]+ parameters, dev loss 1.7000, best dev loss, adapter/$", shown, re.M)


def test_what_went_wrong_is_said_and_cannot_command_the_terminal(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run").train(until=0.3, alarms=[(10, "Beware\x1b[2J.")])
    run.write("failed", error="the disk is full")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step"')
    shown = inspected(capsys, run.path)
    assert "! the disk is full" in shown and "! Beware�[2J. (step 10)" in shown and "\x1b" not in shown
    assert "! the end of metrics.jsonl is truncated" in shown


def test_what_is_shown_cannot_command_the_terminal_and_keeps_the_characters_of_every_language():
    for text in (
        "全角\u3000空白 10\u00a0000\u202f€",
        "می\u200cخواهم क्\u200dष 👩\u200d🚀 \u200fעברית\u200e",
        "soft\u00adhyphen\ttab\nline",
    ):
        assert printable(text) == text
    for character in "\x1b\r\x07\x9b\x7f\ud83d\u202e\u2066\u2069":
        assert printable(f"a{character}b") == "a�b", repr(character)


def test_a_config_is_the_run_that_it_belongs_to_as_for_every_command(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    text = to_yaml(load_config("configs/llama7b.yaml", [f"output.output_dir={run.path}"]))
    for file in (run.path / "config.yaml", tmp_path / "my.yaml"):
        file.write_text(text)
        assert inspected(capsys, file) == inspected(capsys, run.path), file
    (tmp_path / "my.yaml").write_text(text.replace(str(run.path), str(tmp_path / "later")))
    assert cli.main(["inspect", str(tmp_path / "my.yaml")]) == 2
    assert f"{tmp_path / 'later'} does not exist" in capsys.readouterr().err


def test_a_run_that_has_only_begun(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run")
    shown = inspected(capsys, run.write("running"))
    assert "running" in shown and "not measured" in shown


def test_a_run_that_was_killed_is_not_called_running(tmp_path, capsys):
    run = MadeUpRun(tmp_path / "run").train()
    run.write("running")
    holding = "import sys, time; from sora_llm.running.run_state import run_lock\n"
    holding += "with run_lock(__import__('pathlib').Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holding, run.path], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            assert "no alarms" in inspected(capsys, run.path)
        finally:
            holder.kill()
    said = f"process {holder.pid}, which ran it, was killed; the same command resumes from step 0"
    shown = inspected(capsys, run.path)
    assert shown.startswith(f"{run.path}: failed\n") and f"! {said}\n" in shown
    found = json.loads(inspected(capsys, run.path, "--json"))
    assert (found["state"], found["error"]) == ("failed", said)
    table = inspected(capsys, run.path, run.path)
    assert "failed" in table and "running" not in table
    assert said in (run.path / "report.html").read_text(encoding="utf-8")
    (run.path / ".lock").write_text(f"process {holder.pid} on another-machine", encoding="utf-8")
    assert "no alarms" in inspected(capsys, run.path), "whose locks may not be seen here"


@pytest.mark.parametrize(
    ("name", "said"), [("missing", "output.output_dir"), ("empty", "output.output_dir"), ("file", "is missing in")]
)
def test_what_is_no_run_directory_is_bad_input(tmp_path, capsys, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert cli.main(["inspect", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and said in error and "Traceback" not in error
    assert not (tmp_path / "empty" / "report.html").exists()


@pytest.mark.parametrize(("file", "kind"), [("config.json", "a whole model"), ("a.gguf", "an adapter for llama.cpp")])
def test_what_was_exported_for_others_is_named(tmp_path, capsys, file, kind):
    (tmp_path / file).write_text("{}")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert f"holds {kind}; name a run, a checkpoint or a LoRA" in capsys.readouterr().err


def test_it_loads_no_torch(tmp_path):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    check = (
        "import sys; from sora_llm.cli import main; main(['inspect', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check, str(run.path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
