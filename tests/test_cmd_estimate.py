"""`sora-llm estimate`: the strategy, memory and time of the run that a config describes."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest
from runs import CONFIG, gsm8k_overrides

from sora_llm import cli
from sora_llm.estimates.memory import MemoryEstimate
from sora_llm.topology import REDUCE_BUCKET_ELEMENTS


def test_estimate_prints_json(tmp_path, capsys):
    overrides = gsm8k_overrides(tmp_path / "run")
    assert cli.main(["estimate", CONFIG, *overrides, "--num-processes", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["strategy"], printed["num_processes"], printed["frozen_parameters"]) == ("zero2", 2, 260032)
    assert cli.main(["estimate", CONFIG, *overrides, "distributed.sync_every=4", "--num-processes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["strategy"] == "ddp", "as the run would resolve it"


def test_estimate_says_how_long_a_step_would_take_on_what_gpus(tmp_path, capsys):
    overrides = gsm8k_overrides(tmp_path / "run", **{"train.gradient_checkpointing": True})
    found = []
    for tflops in ("100", "200"):
        options = ["--num-processes", "2", "--tflops", tflops, "--utilisation", "0.5", "--json"]
        assert cli.main(["estimate", CONFIG, *overrides, *options]) == 0
        found.append(json.loads(capsys.readouterr().out)["step"])
    slow, fast = found
    assert slow["assumed"]["flops"] == 1e14 and slow["tokens"] == 2 * 320
    # stories260k: five layers of 64 × (64, 32, 32, 64) and 3 · 64 × 172, a head of 512 × 64, r = 64 on all linears
    linear, head = 5 * (64 * 192 + 3 * 64 * 172), 512 * 64
    adapter = 5 * 64 * (128 + 96 + 96 + 128 + 3 * 236 + 7)  # with a gate a slot
    assert slow["compute"] == pytest.approx(640 * (6 * linear + 4 * head + 8 * adapter) / 5e13)
    assert fast["compute"] == pytest.approx(slow["compute"] / 2) and fast["reduce"] == slow["reduce"] > 0
    assert slow["seconds"] == pytest.approx(slow["compute"] + slow["reduce"] + slow["gather"])
    assert cli.main(["estimate", CONFIG, *overrides, "--tflops", "200"]) == 0
    assert "calculated for GPUs of 200 TFLOP/s at 35% (not measured" in capsys.readouterr().out


BAD_ESTIMATES = [
    (["--num-processes", "0"], "--num-processes is 0; it must be at least 1"),
    (["model.name_or_path=/nope/x"], "model.name_or_path: there is no folder /nope/x"),
    (["--tflops", "0"], "--tflops is 0; it must be above 0"),
    (["--utilisation", "1.5"], "--utilisation is 1.5; it must be above 0 and at most 1"),
    (["--between", "nan"], "--between is nan; it must be above 0"),
    (["--num-processes", "8", "distributed.strategy=none"], "distributed.strategy is none, which is for one process"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_ESTIMATES)
def test_estimate_refuses_bad_input(tmp_path, capsys, arguments, said):
    assert cli.main(["estimate", CONFIG, *gsm8k_overrides(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sora_llm: {said}") and error.count("\n") == 1


def test_the_estimate_counts_what_local_updates_keep_between_rounds(tmp_path, capsys):
    """The adapter that was agreed on, and with an outer momentum its velocity, in float32 (`running.rounds`)."""
    run = ["estimate", CONFIG, *gsm8k_overrides(tmp_path / "run"), "distributed.strategy=ddp", "--num-processes", "2"]
    found = []
    for settings in ([], ["distributed.sync_every=4"], ["distributed.sync_every=4", "distributed.outer_momentum=0.9"]):
        assert cli.main([*run, *settings, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert cli.main([*run, *settings]) == 0
        assert ("kept between rounds" in capsys.readouterr().out) == bool(settings)
    copy = 4 * found[0]["trainable_parameters"]
    assert [each["round_bytes"] for each in found] == [0, copy, 2 * copy]
    sums = [MemoryEstimate(**{field.name: each[field.name] for field in fields(MemoryEstimate)}) for each in found]
    assert [memory.total_bytes - sums[0].total_bytes for memory in sums] == [0, copy, 2 * copy]


def test_the_estimate_counts_evaluation_if_there_are_dev_rows(tmp_path, capsys):
    run = ["estimate", CONFIG, *gsm8k_overrides(tmp_path / "run"), "--json"]
    found = {}
    for rows in (1, 64):
        for dev in ("null", "8"):
            settings = [f"evaluation.per_device_eval_batch_size={rows}", f"data.val_set_size={dev}"]
            assert cli.main([*run, "data.val_datasets=null", *settings]) == 0
            found[rows, dev] = json.loads(capsys.readouterr().out)["activation_bytes"]
    assert found[1, "null"] == found[1, "8"] == found[64, "null"] < found[64, "8"]


def test_the_estimate_reads_what_the_deepspeed_config_says_of_buffers_and_weights_that_stay_whole(tmp_path, capsys):
    """max_live_parameters bounds what is fetched ahead alone."""
    overrides = [*gsm8k_overrides(tmp_path / "run"), "distributed.strategy=zero3"]
    file = tmp_path / "zero.json"
    found = []
    buckets = []
    for section in (
        {},
        {"stage3_max_live_parameters": 1e3},
        {"stage3_max_reuse_distance": 1e3, "reduce_bucket_size": 5e5},
    ):
        file.write_text(json.dumps({"zero_optimization": section}))
        run = [*overrides, f"distributed.deepspeed_config={file}", "--num-processes", "4", "--json"]
        assert cli.main(["estimate", CONFIG, *run]) == 0
        said = json.loads(capsys.readouterr().out)
        found.append(said["gathered_bytes"])
        buckets.append(said["bucket_bytes"])
    assert found[0] == found[1] > found[2] > 0
    assert buckets == [4 * REDUCE_BUCKET_ELEMENTS, 4 * REDUCE_BUCKET_ELEMENTS, 2_000_000]


def test_no_more_is_needed_of_a_base_than_its_config(stories, tmp_path, capsys):
    """Before it is downloaded, that is; a run refuses the same folder."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(stories / "config.json", bare)
    found = []
    for base in (stories, bare):
        run = gsm8k_overrides(tmp_path / "run", **{"model.name_or_path": str(base)})
        assert cli.main(["estimate", CONFIG, *run, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert cli.main(["estimate", CONFIG, *run, "model.revision=main"]) == 2
    assert f"model.revision is 'main' but {bare} is a local folder" in capsys.readouterr().err
    assert cli.main(["train", CONFIG, *run]) == 2
    assert f"the folder {bare} holds no weights" in capsys.readouterr().err
