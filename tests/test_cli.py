"""`sora-llm`: what it lists works, and the estimate is what the tensors weigh."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from shutil import which

import pytest
import torch
from conftest import shared
from runs import gsm8k_overrides
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm import cli
from sora_llm.backbone import load_backbone, load_model_config, skeleton
from sora_llm.base_spec import BackboneSpec
from sora_llm.estimates.memory import LIVE_ELEMENTS, BatchShape, MemoryEstimate, estimate, memory_table
from sora_llm.inject import adapter_parameters, inject_sora
from sora_llm.targets import linear_layers
from sora_llm.topology import REDUCE_BUCKET_ELEMENTS

CONFIG = "configs/llama7b.yaml"
OF_A_STEP = {
    "batch": BatchShape(1, 8, False, False),
    "live_elements": LIVE_ELEMENTS,
    "bucket_elements": REDUCE_BUCKET_ELEMENTS,
    "round_copies": 0,
}


def test_help_lists_every_command_without_loading_torch():
    check = "import sys; from sora_llm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert shown.returncode == 0
    for command in cli.COMMANDS:
        assert f"  {command} " in shown.stdout


def test_the_help_page_tells_the_whole_way_in_order():
    page = cli.usage()
    way = ["doctor", "preprocess", "estimate", "train", "inspect", "evaluate", "chat", "export", "consensus"]
    places = [page.index(f"  {step} ") for step in way] + [page.index("vllm serve")]
    assert places == sorted(places)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_every_command(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in cli.COMMANDS) and "top-p" in script and "num-processes" in script
    parsed = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True) if which(shell) else None
    assert parsed is None or (parsed.returncode, parsed.stderr) == (0, "")


TAKE_PATHS = set(cli.COMMANDS) - {"completion", "doctor"}


@pytest.mark.skipif(which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sora-llm", "pre"], {"preprocess"}),
        (["sora-llm", "generate", "--max"], {"--max-new-tokens"}),
        (["sora-llm", "completion", ""], {"bash", "zsh", "fish"}),
        *((["sora-llm", command, "READ"], {"README.md"}) for command in sorted(TAKE_PATHS)),
    ],
)
def test_bash_completes_commands_options_and_choices(words, expected, capsys):
    assert cli.main(["completion", "bash"]) == 0
    typed = " ".join(repr(word) for word in words)
    script = f"{capsys.readouterr().out}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}\n"
    script += "$(complete -p sora-llm | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\nprintf '%s\\n' \"${COMPREPLY[@]}\""
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert {word.strip() for word in shown.stdout.split()} >= expected
    assert all(word.startswith(words[-1]) for word in shown.stdout.split())


def test_making_completions_leaves_argparse_as_it_was(capsys):
    before = argparse.ArgumentParser.parse_known_args
    assert cli.main(["completion", "bash"]) == 0
    assert argparse.ArgumentParser.parse_known_args is before


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help_page(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0 and f"sora-llm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_wrong_option_is_a_sentence(command, capsys):
    assert cli.main([command, "--no-such-option"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"see sora-llm {command} --help" in said


@pytest.mark.parametrize("command", ["train", "estimate", "evaluate", "generate"])
def test_what_may_be_left_out_is_not_called_missing(command, capsys):
    assert cli.main([command]) == 2
    assert "section.key=value" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_gets_escapes_for_what_it_lacks(encoding):
    script = "from sora_llm import cli; cli.main(['--version']); print('λ → é')"
    shown = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True
    )
    assert r"\u03bb \u2192" in shown.stdout.decode(encoding)


def test_a_result_that_cannot_be_printed_is_a_sentence(tmp_path, capfd):
    with Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        assert cli.main(["estimate", "configs/llama7b.yaml", *gsm8k_overrides(tmp_path)]) == 1
    assert "cannot be printed: No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["export", "--help"], ["train", CONFIG, "--print-config"]]
)
def test_no_page_ends_in_a_traceback_where_it_cannot_be_printed(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "sora_llm", *arguments], stdout=full, stderr=-1, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be printed" in done.stderr


def test_an_unknown_command_is_bad_input(capsys):
    assert cli.main(["trian"]) == cli.main(["xyz"]) == 2
    error = capsys.readouterr().err
    assert "did you mean train?" in error and "commands: doctor, preprocess, " in error


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


def test_evaluate_refuses_an_adapter_that_is_none(tmp_path, capsys):
    assert cli.main(["evaluate", CONFIG, *gsm8k_overrides(tmp_path / "run"), "--adapter", str(tmp_path)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"load_in_4bit": True}, 0.02),  # bitsandbytes keeps a code book of 16 floats and an offset per weight as well
        ({"load_in_4bit": True, "double_quant": False}, 0.02),
        ({"load_in_8bit": True}, 0.02),
        ({}, 0.0),
        ({"dtype": "float32"}, 0.0),
    ],
)
def test_the_estimate_is_what_the_tensors_weigh(options, tolerance):
    spec = BackboneSpec(str(shared("models/base5m")), **options)
    memory = estimate(
        skeleton(load_model_config(spec), spec),
        spec,
        r=8,
        target_modules="all-linear",
        adapter_bytes_each=4,
        strategy="none",
        num_processes=1,
        **OF_A_STEP,
    )
    model = load_backbone(spec, "cpu")
    assert memory.weight_bytes == pytest.approx(_weight_bytes(model), rel=tolerance)
    inject_sora(model, r=8)
    adapters = list(adapter_parameters(model).values())
    assert memory.trainable_parameters == sum(p.numel() for p in adapters)
    assert memory.adapter_bytes == memory.gradient_bytes == sum(p.nbytes for p in adapters)
    assert memory.optimizer_bytes == 2 * memory.adapter_bytes  # two float32 moments


def _weight_bytes(model: torch.nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            total += state.absmax.nbytes
            state = getattr(state, "state2", None)
        scales = getattr(parameter, "SCB", None)
        total += 0 if scales is None else scales.nbytes
    return total


def test_zero_divides_what_it_shards():
    spec = BackboneSpec(str(shared("models/base5m")), load_in_4bit=True)
    bones = skeleton(load_model_config(spec), spec)

    def of(strategy: str):
        options = {"r": 8, "target_modules": ["q_proj"], "adapter_bytes_each": 4, **OF_A_STEP}
        return estimate(bones, spec, strategy=strategy, num_processes=2, **options)

    alone, ddp, zero1, zero2, zero3 = (of(strategy) for strategy in ("none", "ddp", "zero1", "zero2", "zero3"))
    assert ddp == alone
    assert zero1.optimizer_bytes == alone.trainable_parameters * 12 // 2  # with the float32 master
    assert zero1.bucket_bytes == zero3.bucket_bytes == 4 * REDUCE_BUCKET_ELEMENTS and ddp.bucket_bytes == 0
    assert zero1.gradient_bytes == alone.gradient_bytes and zero2.gradient_bytes == alone.gradient_bytes // 2
    constants = sum(linear.weight.numel() // 64 for linear in linear_layers(bones).values())  # which ZeRO does not know
    assert zero2.weight_bytes == alone.weight_bytes
    assert zero3.weight_bytes == constants + -(-(alone.weight_bytes - constants) // 2)
    assert zero3.gathered_bytes == alone.weight_bytes - zero3.weight_bytes, "a small model may be whole in a step"
    assert zero3.total_bytes - zero3.gathered_bytes < zero2.total_bytes


def test_zero3_leaves_so_many_weights_whole_and_not_more():
    """DeepSpeed's 10⁹ elements, of two bytes where 4-bit weights are stored as bfloat16."""
    with torch.device("meta"):
        bones = LlamaForCausalLM(LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40))
    spec = BackboneSpec("x", load_in_4bit=True, quant_storage="bfloat16")
    options = {"r": 8, "target_modules": "all-linear", "adapter_bytes_each": 4, "strategy": "zero3", **OF_A_STEP}
    two, eight = (estimate(bones, spec, num_processes=number, **options) for number in (2, 8))
    assert two.gathered_bytes == eight.gathered_bytes == 2 * 10**9
    assert eight.weight_bytes < two.weight_bytes / 3
    assert "gathered, at most     1.86 GiB per process" in memory_table(two)
    embeddings = bones.get_input_embeddings().weight.numel() * 2
    for live, expected in ((3 * 10**8, 6 * 10**8), (0, embeddings)):
        found = estimate(bones, spec, num_processes=2, **{**options, "live_elements": live})
        assert found.gathered_bytes == expected, live


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
