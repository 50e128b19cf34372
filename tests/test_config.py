"""A config that is valid is read exactly, under the names that other trainers have as well."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import config_reference
import pytest
import yaml
from smallest_config import SMALLEST, TWO, message_of
from smallest_config import load as load

from sora_llm.config import ALIASES, Config, Dataset, from_dict, load_config, to_dict, to_yaml
from sora_llm.row_types import FIELDS

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


# -------------------------------------------------------------------------------------------------------- what is valid


def test_the_required_keys_are_enough_and_the_rest_has_the_documented_defaults(load):
    config = load()
    assert config.model.name_or_path == "some/model"
    assert config.data.datasets[0].type == "alpaca"
    assert (config.sora.r, config.sora.lora_alpha, config.sora.gate_lr) == (64, 16.0, "auto")
    assert (config.sora.consensus, config.sora.consensus_at, config.data.sample_packing) == ("svd", 0.4, True)
    assert (config.train.seed, config.distributed.strategy, config.output.report_to) == (42, "auto", ("tensorboard",))


def test_every_key_of_the_schema_is_printed(load):
    printed = to_dict(load())
    assert list(printed) == ["model", "quantization", "sora", "data", "train", "distributed", "evaluation", "output"]
    assert printed["train"]["num_train_epochs"] is None
    assert printed["data"]["datasets"][0]["columns"] == {}
    assert printed["output"]["hub_model_id"] is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_being_written_and_read_again(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(again) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config), "other YAML readers see the same values"
    assert from_dict(to_dict(config), "a checkpoint") == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_starts_with_its_launch_command_and_explains_every_key(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines[: lines.index("model:")] if line]
    assert all(line.startswith("#") for line in header)
    assert any("accelerate launch" in line and f"-m sora_llm.train configs/{path.name}" in line for line in header)
    keys = [line for line in lines if line.startswith(" ")]
    assert len(keys) > 15
    assert [line for line in keys if "  # " not in line and not line.lstrip().startswith("- What")] == []


def test_every_key_is_explained_and_the_page_of_them_is_up_to_date():
    for section in fields(Config):
        for name, comment in config_reference.comments_of(type(getattr(Config(), section.name))).items():
            assert comment, f"{section.name}.{name} has no comment"
    assert config_reference.PAGE.read_text(encoding="utf-8") == config_reference.page(), (
        "python tests/config_reference.py writes it anew"
    )


def test_the_main_config_trains_on_a_cpu_with_only_the_usual_overrides():
    llama = next(path for path in SHIPPED if path.name == "llama7b.yaml")
    config = load_config(
        llama,
        [
            "model.name_or_path=../shared/models/stories260k",
            "data.datasets=[{path: ../shared/data/gsm8k_train.jsonl, type: prompt_completion, "
            "columns: {prompt: question, completion: answer}}]",
            "data.val_set_size=null",
            "data.sequence_len=256",
            "train.max_steps=20",
            "train.num_train_epochs=null",
            "train.per_device_train_batch_size=2",
            "train.learning_rate=4e-3",
            "output.output_dir=/tmp/run",
        ],
    )
    assert (config.distributed.strategy, config.model.attn_implementation) == ("auto", "sdpa")
    assert (config.model.revision, config.data.cache_dir, config.data.chat_template) == (None, None, None)
    assert (config.evaluation.sample_prompts, config.output.report_to) == ((), ("tensorboard",))


def test_text_that_looks_like_something_else_survives_being_written_and_read_again(load, tmp_path):
    texts = [
        "1e-4",
        "1E5",
        "0.5",
        "null",
        "true",
        "yes",
        "12:30",
        "2024-01-01",
        "a: b",
        "# c",
        "",
        " d ",
        "é\n\tλ",
        "0x1f",
    ]
    config = load(f"evaluation.sample_prompts={json.dumps(texts)}")
    assert list(config.evaluation.sample_prompts) == texts
    assert load(text=to_yaml(config)) == config


def test_a_number_may_be_written_without_its_dot_in_the_file_and_on_the_command_line(load):
    assert (
        load(text=SMALLEST.replace("max_steps: 10", "max_steps: 10, learning_rate: 1e-4")).train.learning_rate == 1e-4
    )
    config = load("train.learning_rate=3E-3", "sora.gate_lr=1", "sora.sparse_lambda=0")
    assert (config.train.learning_rate, config.sora.gate_lr, config.sora.sparse_lambda) == (3e-3, 1.0, 0.0)
    assert type(config.sora.gate_lr) is float


def test_val_set_size_is_a_fraction_below_one_and_a_count_from_one(load):
    assert load("data.val_set_size=0.1").data.val_set_size == 0.1
    count = load("data.val_set_size=500").data.val_set_size
    assert count == 500
    assert type(count) is int


def test_a_config_cannot_be_changed_after_it_was_checked(load):
    with pytest.raises(AttributeError):
        load().sora.r = 8


def test_reading_a_config_imports_nothing_heavy():
    code = (
        "import sys, sora_llm.config; print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_type_that_the_config_takes_has_fields():
    assert set(get_args(get_type_hints(Dataset)["type"])) == set(FIELDS)


@pytest.mark.parametrize(
    "override",
    [TWO % ("weight: 3", ", weight: 0.5"), TWO % ("streaming: true, weight: 1", ", streaming: true, weight: 2")],
)
def test_mixtures_and_streams_are_settings_like_others(load, override):
    assert len(load(override).data.datasets) == 2


def test_patterns_for_all_modules_may_be_the_only_budget(load):
    assert load("sora.sparse_lambda=null", "sora.budgets={attn: 2}").sora.budgets == {"attn": 2.0}


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_reach_into_lists_and_maps_and_the_last_one_wins(load):
    config = load(
        "data.datasets.0.path=other.jsonl",
        "data.datasets.1.path=more.jsonl",
        "data.datasets.1.columns.instruction=question",
        "sora.target_modules=[q_proj, v_proj]",
        "sora.r=8",
        "sora.r=4",
    )
    assert [dataset.path for dataset in config.data.datasets] == ["other.jsonl", "more.jsonl"]
    assert config.data.datasets[1].columns == {"instruction": "question"}
    assert (config.sora.target_modules, config.sora.r) == (("q_proj", "v_proj"), 4)


def test_an_override_makes_the_section_or_list_that_is_missing(load):
    config = load("quantization.load_in_4bit=false", "data.val_datasets.0.path=dev.jsonl")
    assert config.quantization.load_in_4bit is False
    assert config.data.val_datasets[0].path == "dev.jsonl"
    assert (
        load(
            "model.name_or_path=m",
            "data.datasets.0.path=d",
            "train.max_steps=1",
            "sora.sparse_lambda=0.1",
            "output.output_dir=o",
            text="",
        ).model.name_or_path
        == "m"
    )


def test_null_unsets_a_key_so_that_its_default_holds(load):
    config = load("sora.r=null", "train.max_steps=null", "train.num_train_epochs=0.5", "output.report_to=null")
    assert (config.sora.r, config.train.max_steps, config.train.num_train_epochs) == (64, None, 0.5)
    assert config.output.report_to == ("tensorboard",)
    assert load(text=SMALLEST + "quantization:\n").quantization.load_in_4bit is True


def test_null_is_no_clipping_and_every_checkpoint_where_the_field_says_so(load):
    config = load("train.max_grad_norm=null", "output.save_total_limit=null")
    assert (config.train.max_grad_norm, config.output.save_total_limit) == (None, None)
    assert load(text=to_yaml(config)) == config


def test_an_override_of_one_entry_leaves_another_with_the_same_yaml_anchor_alone(load):
    text = SMALLEST.replace("[{path: rows.jsonl}]", "[&rows {path: rows.jsonl}, *rows]")
    datasets = load("data.datasets.0.path=other.jsonl", text=text).data.datasets
    assert [dataset.path for dataset in datasets] == ["other.jsonl", "rows.jsonl"]
    text = SMALLEST.replace("[{path: rows.jsonl}]", "&all [{path: rows.jsonl}], val_datasets: *all")
    data = load("data.val_datasets.0.path=dev.jsonl", text=text).data
    assert (data.datasets[0].path, data.val_datasets[0].path) == ("rows.jsonl", "dev.jsonl")


def test_a_value_may_contain_an_equals_sign(load):
    assert load("output.output_dir=runs/lr=1").output.output_dir == "runs/lr=1"


# -------------------------------------------------------------------------------------------------------------- aliases


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.torch_dtype=bfloat16", "model.dtype", "bfloat16"),
        ("model.base_model=a/b", "model.name_or_path", "a/b"),
        ("model.model_name_or_path=a/b", "model.name_or_path", "a/b"),
        ("data.cutoff_len=64", "data.sequence_len", 64),
        ("data.max_length=64", "data.sequence_len", 64),
        ("data.max_seq_length=64", "data.sequence_len", 64),
        ("train.micro_batch_size=2", "train.per_device_train_batch_size", 2),
        ("train.lr=0.1", "train.learning_rate", 0.1),
        ("train.lr_scheduler=linear", "train.lr_scheduler_type", "linear"),
        ("sora.lora_r=8", "sora.r", 8),
        ("sora.rank=8", "sora.r", 8),
        ("sora.alpha=8", "sora.lora_alpha", 8.0),
        ("sora.dropout=0.1", "sora.lora_dropout", 0.1),
        ("sora.lora_target_modules=[q_proj]", "sora.target_modules", ["q_proj"]),
        ("sora.lambda=0.5", "sora.sparse_lambda", 0.5),
        ("sora.lambda_=0.5", "sora.sparse_lambda", 0.5),
        ("evaluation.eval_batch_size=3", "evaluation.per_device_eval_batch_size", 3),
        ("model.dtype=bf16", "model.dtype", "bfloat16"),
        ("model.dtype=fp32", "model.dtype", "float32"),
    ],
)
def test_a_name_known_from_elsewhere_means_our_key(load, override, key, value):
    section, name = key.split(".")
    assert to_dict(load(override))[section][name] == value


def test_every_alias_leads_to_a_key_and_hides_none(load):
    schema = to_dict(load())
    for alias, key in ALIASES.items():
        section, name = key.split(".")
        assert name in schema[section]
        assert alias.split(".")[1] not in schema[section]


def test_an_alias_in_the_file_works_and_the_command_line_overrides_it_by_either_name(load):
    text = SMALLEST.replace("max_steps: 10", "max_steps: 10, micro_batch_size: 3")
    assert load(text=text).train.per_device_train_batch_size == 3
    assert load("train.per_device_train_batch_size=5", text=text).train.per_device_train_batch_size == 5
    assert load("train.micro_batch_size=6", text=text).train.per_device_train_batch_size == 6


def test_an_alias_and_its_key_in_one_file_are_an_error(load):
    message = message_of(load, text=SMALLEST.replace("0.3", "0.3, lambda: 0.5"))
    assert "sora.sparse_lambda and sora.lambda mean the same" in message
