"""`sora-llm convert`: other trainers' configs as ours, which train; what they ask for beyond that is said."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_llm import cli
from sora_llm.config import from_dict, load_config, translate
from sora_llm.config.from_elsewhere import _HANDLERS
from sora_llm.config.names import NAMES_ELSEWHERE, NO_EQUIVALENT
from sora_llm.errors import UserError
from sora_llm.train import main as train

AXOLOTL = """
base_model: some/llama
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
chat_template: llama3
datasets:
  - path: some/chats
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
  - {path: json, data_files: [rows.jsonl], type: alpaca, split: train}
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0
lora_target_modules:
lora_target_linear: true
sequence_len: 4096
sample_packing: true
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
max_steps: 50
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: unsloth
logging_steps: 1
flash_attention: true
warmup_steps: 0
evals_per_epoch: 4
saves_per_epoch: 1
deepspeed: deepspeed_configs/zero3_bf16.json
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
"""

LLAMA_FACTORY = """
model_name_or_path: some/llama
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 9
lora_target: q_proj, v_proj
dataset: identity
template: vicuna
cutoff_len: 1024
output_dir: saves/sft
save_steps: 0.1
num_train_epochs: 3.0
learning_rate: 1.0e-4
lr_scheduler_type: cosine_with_restarts
warmup_ratio: 0.1
fp16: true
quantization_bit: 8
val_size: 0
report_to: none
"""


def converted(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "theirs.yml"
    file.write_text(text)
    assert cli.main(["convert", str(file), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_axolotl_config_becomes_one_of_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = converted(capsys, tmp_path, AXOLOTL)
    assert found["problem"] is None
    assert found["config"] == {
        "model": {"name_or_path": "some/llama", "dtype": "bfloat16", "attn_implementation": "flash_attention_2"},
        "quantization": {"load_in_4bit": True, "load_in_8bit": False},
        "sora": {
            "r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0,
            "target_modules": "all-linear",
            "target_rank": 16,
        },
        "data": {
            "datasets": [
                {"path": "some/chats", "type": "sharegpt", "columns": {"conversations": "turns"}},
                {"path": "rows.jsonl", "type": "alpaca", "split": "train"},
            ],
            "val_set_size": 0.05,
            "chat_template": "llama-3",
            "train_on_inputs": False,
            "sequence_len": 4096,
            "sample_packing": True,
        },
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": 50,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "gradient_checkpointing": True,
        },
        "distributed": {"strategy": "zero3"},
        "output": {"output_dir": "./out", "logging_steps": 1, "report_to": ["wandb"]},
    }
    assert sorted(found["notes"]) == [
        "(sora.target_rank)", "deepspeed", "evals_per_epoch", "saves_per_epoch", "special_tokens", "wandb_project",
    ]  # fmt: skip


def test_a_llama_factory_config_becomes_one_of_ours_but_for_its_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = converted(capsys, tmp_path, LLAMA_FACTORY)
    assert found["config"] == {
        "model": {"name_or_path": "some/llama", "dtype": "float16"},
        "quantization": {"load_in_4bit": False, "load_in_8bit": True},
        "sora": {"r": 9, "lora_alpha": 18, "target_modules": ["q_proj", "v_proj"], "target_rank": 5},
        "data": {"chat_template": "vicuna", "sequence_len": 1024, "sample_packing": False},
        "train": {"num_train_epochs": 3.0, "learning_rate": 1e-4, "warmup_ratio": 0.1},
        "output": {"output_dir": "saves/sft", "report_to": []},
    }
    assert "data.datasets is missing" in found["problem"]
    assert "data.datasets" in found["notes"]["dataset"] and "number of steps" in found["notes"]["save_steps"]
    assert "cosine_with_restarts is not one of" in found["notes"]["lr_scheduler_type"]


def test_a_template_that_is_not_built_in_is_left_to_the_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = converted(capsys, tmp_path, AXOLOTL.replace("llama3", "qwen_25"))
    assert "chat_template" not in found["config"]["data"] and "qwen_25" in found["notes"]["data.chat_template"]
    (tmp_path / "mine.jinja").touch()
    found = converted(capsys, tmp_path, AXOLOTL.replace("llama3", f"{tmp_path}/mine.jinja"))
    assert found["config"]["data"]["chat_template"] == f"{tmp_path}/mine.jinja"


def test_what_is_printed_can_be_read_and_says_what_is_not_in_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = converted(capsys, tmp_path, AXOLOTL)
    assert cli.main(["convert", str(tmp_path / "theirs.yml")]) == 0
    text = capsys.readouterr().out
    (tmp_path / "ours.yaml").write_text(text)
    assert yaml.safe_load(text) == found["config"]
    assert load_config(tmp_path / "ours.yaml").sora.target_rank == 16
    for key, note in found["notes"].items():
        assert f"#   {key}: {note}\n" in text


def test_what_an_alternative_says_is_what_the_whole_says() -> None:
    def config_of(**keys: Any) -> dict[str, Any]:
        return translate({"base_model": "m", "lora_r": 8, **keys}, "theirs.yml").config

    assert config_of(adapter="lora")["quantization"] == {"load_in_4bit": False}
    assert config_of(adapter="qlora")["quantization"] == {"load_in_4bit": True}
    assert config_of(num_epochs=3, max_steps=-1)["train"] == {"num_train_epochs": 3}
    assert config_of(max_steps=9, num_epochs=3)["train"] == {"max_steps": 9}
    assert config_of(lora_target_modules=["q_proj"])["sora"]["target_modules"] == ["q_proj"]
    everything = config_of(lora_target_modules=["q_proj"], lora_target_linear=True)
    assert everything["sora"]["target_modules"] == "all-linear"
    assert "target_rank" not in config_of(**{"lambda": 0.3})["sora"]
    assert config_of(deepspeed="ds_config.json")["distributed"] == {"deepspeed_config": "ds_config.json"}
    assert config_of(fsdp=["full_shard"])["distributed"] == {"strategy": "zero3"}
    assert config_of(hub_model_id="a/b")["output"] == {"push_to_hub": True, "hub_model_id": "a/b"}
    assert config_of(lora_r=16, lora_alpha=8, peft_use_rslora=True)["sora"]["lora_alpha"] == 32, "32 / 16 = 8 / √16"
    floor = {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}
    assert config_of(lr_scheduler="cosine", cosine_min_lr_ratio=0.1)["train"] == floor
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "learning_rate": 1e-4}
    assert config_of(**kwargs)["train"] == pytest.approx({**floor, "learning_rate": 1e-4})
    assert config_of(chat_template="tokenizer_default").get("data") == {"sample_packing": False}
    assert config_of(chat_template="jinja", chat_template_jinja="t.jinja")["data"]["chat_template"] == "t.jinja"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sora: {r: 8}\nmodel: {}", "there is nothing to translate"),
        ("base_model: m\nmicro_batch_size: 1", "has none of the keys adapter"),
        ("", "has none of the keys adapter"),
        ("[1]", "a config is a mapping"),
        ("base_model: m\nadapter: lora\nrl: dpo", "rl: dpo; training here is supervised"),
        ("lora_rank: 8\nstage: rm", "stage: rm; training here is supervised"),
        ("base_model: m\nadapter:", "adapter: null; only LoRA becomes SoRA"),
        ("model_name_or_path: m\nfinetuning_type: full", "finetuning_type: 'full'; only LoRA becomes SoRA"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "theirs.yml").write_text(text)
    assert cli.main(["convert", str(tmp_path / "theirs.yml")]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("entry", [{"type": {"field_output": "a"}}, {"type": "user_defined"}, {"type": 3}, {}])
def test_types_of_rows_that_are_not_known_are_custom(entry: dict[str, Any]) -> None:
    found = translate({"lora_r": 8, "datasets": [{"path": "a.jsonl", **entry}]}, "theirs.yml")
    (ours,) = found.config["data"]["datasets"]
    assert ours.get("type") == ("custom" if entry else None)
    assert ("write custom" in found.notes.get("datasets.0.type", "")) == bool(entry)


def test_a_relative_of_alpaca_is_alpaca_with_a_note() -> None:
    for type_, is_noted in (("alpaca", False), ("alpaca_chat.load_qa", True), ("alpaca:phi", True)):
        found = translate({"lora_r": 8, "datasets": [{"path": "a.jsonl", "type": type_}]}, "theirs.yml")
        assert found.config["data"]["datasets"] == [{"path": "a.jsonl", "type": "alpaca"}]
        assert ("Alpaca's own prompt" in found.notes.get("datasets.0.type", "")) == is_noted


def test_trackers_that_are_none_here_are_noted() -> None:
    for theirs, ours, is_noted in (([], [], False), ("wandb", ["wandb"], False), (["mlflow"], [], True), (3, [], True)):
        found = translate({"lora_r": 8, "report_to": theirs}, "theirs.yml")
        assert found.config["output"]["report_to"] == ours and ("report_to" in found.notes) == is_noted


KEYS = sorted({*_HANDLERS, *NO_EQUIVALENT, *(name for names in NAMES_ELSEWHERE.values() for name in names)})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats(allow_nan=True) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "type", "x"]), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_whatever_the_values_are_it_is_translated_or_refused(theirs: dict[str, Any]) -> None:
    try:
        found = translate({"lora_r": 8, **theirs}, "theirs.yml")
    except UserError:
        return
    with contextlib.suppress(UserError):
        from_dict(found.config, "theirs.yml")
    assert all(isinstance(note, str) for note in found.notes.values())
    assert "target_rank" in found.config["sora"] or {"sparse_lambda"} & found.config["sora"].keys()


def test_a_converted_config_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base5m: Path, gsm8k: Path
) -> None:
    theirs = {
        "base_model": str(base5m),
        "adapter": "qlora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "datasets": [{"path": str(gsm8k), "type": "alpaca", "field_instruction": "question", "field_output": "answer"}],
        "sequence_len": 512,
        "sample_packing": True,
        "micro_batch_size": 2,
        "max_steps": 20,
        "learning_rate": 1e-3,
        "output_dir": str(tmp_path / "run"),
        "bf16": True,
    }
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(theirs))
    assert cli.main(["convert", str(tmp_path / "theirs.yml")]) == 0
    (tmp_path / "ours.yaml").write_text(capsys.readouterr().out)
    assert train([str(tmp_path / "ours.yaml"), f"data.cache_dir={tmp_path / 'cache'}", "--dry-run"]) == 0
