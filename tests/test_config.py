"""A config is read strictly: what is valid is read exactly, everything else ends in a sentence that helps."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import config_reference
import pytest
import yaml

from sora_llm.config import (
    ALIASES,
    Config,
    Dataset,
    differing_keys,
    from_dict,
    load_config,
    resume_conflicts,
    to_dict,
    to_yaml,
)
from sora_llm.errors import UserError
from sora_llm.row_types import FIELDS

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SMALLEST = """
model: {name_or_path: some/model}
data: {datasets: [{path: rows.jsonl}]}
train: {max_steps: 10}
sora: {sparse_lambda: 0.3}
output: {output_dir: runs/a}
"""


@pytest.fixture
def load(tmp_path):
    """Loads SMALLEST, or another text, with overrides."""

    def load(*overrides: str, text: str = SMALLEST) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


def message_of(load, *overrides: str, text: str = SMALLEST) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400, "a sentence or two"
    return message


# ---------------------------------------------------------------------------------------------------- what is valid


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


# -------------------------------------------------------------------------------------------------------- overrides


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


# ---------------------------------------------------------------------------------------------------------- aliases


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


# -------------------------------------------------------------------------------------------------------- bad input

BAD_OVERRIDES = [
    # unknown names
    ("sora.lamda_num=1", "did you mean sora.lambda_num?"),
    ("sora.learning_rate=1", "did you mean train.learning_rate?"),
    ("train.eval_batch_size=1", "did you mean evaluation.per_device_eval_batch_size?"),
    ("trian.max_steps=3", "trian on the command line is not a key of the config; did you mean train?"),
    ("--train.max_steps=3", "did you mean train?"),
    ("data.datasets.0.typ=alpaca", "did you mean data.datasets.0.type?"),
    ("output.zzzz=1", "allowed there: output_dir, logging_steps"),
    ("evaluation.evaluation_strategy=steps", "set evaluation.eval_steps"),
    ("train.evaluation_strategy=steps", "set evaluation.eval_steps"),
    ("train.group_by_length=true", "leave it out; without data.sample_packing rows of like length go together"),
    ("train.optim=adamw_8bit", "the optimizer is always AdamW"),
    # overrides that cannot be read
    ("max_steps=3", "write for example train.max_steps=3"),
    ("train.max_steps", "not of the form section.key=value"),
    ("sora.r=[1", "cannot be read as YAML"),
    ("data.datasets.7.path=x", "needs an index from 0 to 1"),
    ("data.datasets.first.path=x", "needs an index from 0 to 1 in place of first"),
    ("model.name_or_path.x=1", "inside 'some/model'"),
    # types
    ("sora.r=eight", "sora.r is 'eight' on the command line; it must be an integer >= 1"),
    ("sora.r=8.0", "sora.r is 8.0 on the command line; it must be an integer >= 1"),
    ("sora.r=true", "sora.r is true on the command line"),
    ("train.learning_rate=true", "it must be a number > 0"),
    ("train.learning_rate=.nan", "it must be a number > 0"),
    ("train.learning_rate=.inf", "it must be a number > 0"),
    ("train.gradient_checkpointing=1", "it must be true or false"),
    ("quantization.load_in_4bit='yes'", "it must be true or false"),
    ("model.revision=123456", "it must be text or null (put it in quotes)"),
    ("data.datasets={path: x}", "it must be a list"),
    ("data.datasets=[x.jsonl]", "data.datasets.0 is 'x.jsonl' on the command line; it must be a mapping"),
    ("data.datasets.0.columns=[a]", "it must be a mapping of names to text"),
    ("data.datasets.0.columns={1: a}", "it must be a mapping of names to text"),
    ("output.report_to=none", "it must be a list ([] for none), each entry one of tensorboard, wandb"),
    ("output.report_to=[comet]", "one of tensorboard, wandb"),
    # choices
    ("model.dtype=int8", "it must be one of bfloat16, float16, float32"),
    ("model.attn_implementation=flash", "it must be one of sdpa, eager"),
    ("quantization.bnb_4bit_quant_type=int4", "one of nf4, fp4"),
    ("quantization.bnb_4bit_quant_storage=int8", "one of auto, uint8, bfloat16, float16, float32"),
    ("sora.dtype=float16", "one of auto, float32, bfloat16"),
    ("data.datasets.0.type=csv", "one of alpaca, messages, sharegpt, completion, prompt_completion"),
    ("data.excess_length=cut", "one of drop, truncate, split, error"),
    ("data.excess_length=split", "split is for plain text (type completion), and no data set is"),
    ("train.lr_scheduler_type=polynomial", "one of linear, cosine, constant, constant_with_warmup"),
    ("distributed.strategy=fsdp", "one of auto, none, ddp, zero1, zero2, zero3"),
    # ranges
    ("sora.r=0", "sora.r is 0 on the command line; it must be an integer >= 1"),
    ("sora.r=-4", "an integer >= 1"),
    ("sora.lora_alpha=0", "a number > 0"),
    ("sora.lora_dropout=1", "a number >= 0 and < 1"),
    ("sora.sparse_lambda=-0.1", "a number >= 0"),
    ("sora.gate_lr=0", "auto or a number > 0"),
    ("sora.gate_lr=none", "auto or a number > 0"),
    ("sora.consensus_at=1.5", "a number > 0 and <= 1"),
    ("train.max_steps=0", "an integer >= 1 or null"),
    ("train.learning_rate=0", "a number > 0"),
    ("train.warmup_ratio=1.1", "a number >= 0 and <= 1"),
    ("train.per_device_train_batch_size=0", "an integer >= 1"),
    ("train.seed=-1", "an integer >= 0"),
    ("data.val_set_size=0", "an integer >= 1 or a number > 0 and < 1 or null"),
    ("data.val_set_size=20.0", "an integer >= 1"),
    ("data.max_bad_row_fraction=2", "a number >= 0 and <= 1"),
    ("data.sequence_len=1", "an integer >= 2"),
    # missing, or too many
    ("model.name_or_path=null", "model.name_or_path is missing"),
    ("data.datasets=[]", "data.datasets is missing"),
    ("data.datasets=[{type: alpaca}]", "data.datasets.0.path is missing"),
    ("output.output_dir=''", "output.output_dir is missing"),
    ("train.max_steps=null", "None of train.max_steps, train.num_train_epochs is set"),
    ("train.num_train_epochs=3", "train.max_steps (10, in "),
    ("train.num_train_epochs=3", "unset the other, for example with train.max_steps=null on the command line"),
    ("sora.sparse_lambda=null", "None of sora.target_rank, sora.target_params, sora.sparse_lambda is set"),
    ("sora.target_rank=8", "for example with sora.sparse_lambda=null"),
    # combinations
    ("sora.target_modules=[]", "names no module"),
    ("sora.target_modules=[q_proj, '']", "names no module"),
    ("evaluation.eval_steps=10", "needs dev rows; set data.val_set_size or data.val_datasets"),
    ("data.val_datasets=[]", "data.val_datasets is empty"),
    ("quantization.load_in_8bit=true", "exclude each other"),
    ("data.datasets.0.columns={question: q}", "no field of type alpaca; its fields are instruction, input, output"),
    ("data.datasets.0.separator='\\n'", "separator goes with type prompt_completion only"),
]


@pytest.mark.parametrize(("override", "fragment"), BAD_OVERRIDES, ids=lambda value: value if "=" in value else "")
def test_a_bad_value_ends_in_a_sentence_that_says_what_to_do(load, override, fragment):
    assert fragment in message_of(load, override)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["data.val_set_size=5", "data.val_datasets=[{path: x}]"], "with data.val_datasets=null"),
        (["model.dtype=float32", "sora.dtype=bfloat16"], "needs model.dtype bfloat16, not float32"),
        (
            ["quantization.load_in_4bit=false", "quantization.load_in_8bit=true", "distributed.strategy=zero3"],
            "under distributed.strategy zero3 gives wrong losses",
        ),
        (["train.warmup_steps=5", "train.warmup_ratio=0.1"], "both say how long the warm-up is; leave one out"),
        (["data.train_on_inputs=true", "data.train_on_last_turn_only=true"], "contradict each other"),
    ],
)
def test_values_that_do_not_go_together_are_named(load, overrides, fragment):
    assert fragment in message_of(load, *overrides)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("model: {name_or_path: a, name_or_path: b}", "line 1: the key name_or_path is stated twice"),
        ("a: [1, 2\nb: 3", "cannot be read as YAML, line"),
        ("a: \x01", "cannot be read as YAML"),
        ("- model\n- data", "a config is a mapping of the sections model, quantization"),
        ("just words", "a config is a mapping of the sections"),
        ("", "model.name_or_path is missing"),
        ("model: huggyllama/llama-7b", "model is 'huggyllama/llama-7b' in "),
        ("model: &m {revision: *m}", "model.revision is {"),
        ("learning_rate: 1", "did you mean train.learning_rate?"),
        ("3: 1", "3 in "),
        (SMALLEST + "evaluation: {no: 1}", "evaluation.False in "),
        ("a: 1\n---\nb: 2", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_config_ends_in_a_sentence(load, text, fragment):
    assert fragment in message_of(load, text=text)


def test_a_message_names_the_file_or_the_command_line_or_the_default(load):
    assert "run.yaml; it must be an integer" in message_of(load, text=SMALLEST.replace("0.3", "0.3, r: 0"))
    assert "on the command line" in message_of(load, "sora.r=0")
    assert "quantization.load_in_4bit (true, by default)" in message_of(load, "quantization.load_in_8bit=true")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x9f")
    for path, fragment in (("missing.yaml", "does not exist"), (".", "cannot be read"), ("binary.yaml", "not UTF-8")):
        with pytest.raises(UserError, match=fragment):
            load_config(tmp_path / path)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!local", "!!binary"])
def test_yaml_that_tries_to_run_code_is_refused_and_runs_nothing(load, tmp_path, tag):
    trace = tmp_path / "executed"
    value = f"{tag} ['touch {trace}']" if "apply" in tag else f"{tag} ''"
    assert "tags can run code" in message_of(load, text=f"model: {{name_or_path: {value}}}")
    assert "tags can run code" in message_of(load, f"model.name_or_path={value}")
    assert not trace.exists()


# ------------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["sora.target_rank=65", "sora.sparse_lambda=null"], "sora.target_rank (65.0, on the command line) is above"),
        (["sora.threshold=adaptive"], "needs a budget"),
        (["distributed.sync_every=8", "distributed.strategy=zero2"], "use strategy ddp (or auto), or sync_every 1"),
        (["distributed.replica=node"], "goes with local updates; set distributed.sync_every above 1"),
        (["distributed.outer_momentum=0.9"], "goes with local updates"),
        (["distributed.outer_learning_rate=0.7"], "goes with local updates"),
        (["sora.threshold=proxgen", "sora.sparse_lambda=null", "sora.target_rank=4"], "does not go with sora.target_"),
        (["sora.consensus_at=0.1"], "sora.dense_ratio (0.1, by default) must be below sora.consensus_at (0.1, on the"),
        (["sora.min_rank=2"], "goes with a budget"),
        (["sora.budgets={q_proj: 4}"], "goes with a budget"),
        (["sora.sparse_lambda=null", "sora.target_rank=8", "sora.budgets={q_proj: 65}"], "is 65, above sora.r"),
        (["evaluation.early_stopping_patience=2"], "needs dev rows"),
    ],
)
def test_budgets_thresholds_and_phases_that_do_not_go_together_are_refused(load, overrides, fragment):
    assert fragment in message_of(load, *overrides)


# ------------------------------------------------------------------------------------------------------- data sets


def test_every_type_that_the_config_takes_has_fields():
    assert set(get_args(get_type_hints(Dataset)["type"])) == set(FIELDS)


TWO = "data.datasets=[{path: a.jsonl, %s}, {path: b.jsonl%s}]"
STREAMED = "data.datasets=[{path: a.jsonl, streaming: true}]"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["data.datasets.0.type=custom"], "data.datasets.0 is of type custom and has no function"),
        (["data.datasets.0.function='a:b'"], "goes with type custom and no other"),
        ([TWO % ("weight: 2", "")], "data.datasets.0 has weight and data.datasets.1 has not: its share of an epoch's"),
        ([TWO % ("type: alpaca", ", weight: 2")], "data.datasets.1 has weight and data.datasets.0 has not"),
        ([TWO % ("streaming: true", "")], "data.datasets.0 has streaming and data.datasets.1 has not"),
        ([TWO % ("weight: 0", ", weight: 1")], "data.datasets.0.weight is 0 on the command line; it must be"),
        (["data.val_datasets=[{path: x, weight: 1}]"], "data.val_datasets.0.weight does not go with dev rows"),
        (["data.val_datasets=[{path: x, streaming: true}]"], "data.val_datasets.0.streaming does not go with dev rows"),
        ([STREAMED, "train.max_steps=null", "train.num_train_epochs=1"], "set train.max_steps, and train.num_train_ep"),
        ([STREAMED, "data.val_set_size=10"], "data.val_set_size cannot hold out rows of streamed data sets"),
        ([STREAMED, "data.num_proc=2"], "data.num_proc is for data that is prepared"),
        ([STREAMED, "data.drop_duplicates=true"], "data.drop_duplicates would have to remember every row"),
    ],
)
def test_settings_of_data_sets_that_do_not_go_together_are_refused(load, overrides, fragment):
    assert fragment in message_of(load, *overrides)


@pytest.mark.parametrize(
    "override",
    [TWO % ("weight: 3", ", weight: 0.5"), TWO % ("streaming: true, weight: 1", ", streaming: true, weight: 2")],
)
def test_mixtures_and_streams_are_settings_like_others(load, override):
    assert len(load(override).data.datasets) == 2


# ----------------------------------------------------------------------------------------------------------- resume


def test_differing_keys_are_dotted_and_reach_into_lists(load):
    old = to_dict(load())
    assert differing_keys(old, old) == []
    new = to_dict(load("sora.r=8", "data.datasets.0.path=b", "data.datasets.0.columns.input=x"))
    assert set(differing_keys(old, new)) == {
        "sora.r",
        "data.datasets.0.path",
        "data.datasets.0.columns",
        "data.datasets.0.columns.input",
    }


def conflicts(load, *overrides: str, processes: tuple[int, int] = (1, 1)) -> list[str]:
    base = ("train.per_device_train_batch_size=4", "data.val_set_size=0.1")
    return resume_conflicts(to_dict(load(*base)), to_dict(load(*base, *overrides)), *processes)


@pytest.mark.parametrize(
    "override",
    [
        "output.output_dir=elsewhere",
        "output.save_steps=7",
        "output.report_to=[]",
        "evaluation.eval_steps=5",
        "distributed.strategy=zero3",
        "distributed.timeout_minutes=5",
        "distributed.check_every=5",
        "data.num_proc=2",
        "data.cache_dir=/tmp/cache",
        "quantization.bnb_4bit_quant_storage=bfloat16",
    ],
)
def test_a_resumed_run_may_change_where_it_runs_and_what_it_logs(load, override):
    assert conflicts(load, override) == []


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=0.1",
        "train.max_steps=11",
        "train.seed=1",
        "sora.sparse_lambda=0.4",
        "model.dtype=float32",
        "data.sequence_len=64",
        "data.datasets.0.path=b",
        "quantization.bnb_4bit_quant_type=fp4",
        "distributed.sync_every=2",
    ],
)
def test_a_resumed_run_may_not_change_what_it_computes(load, override):
    assert conflicts(load, override) == [override.split("=")[0]]


@pytest.mark.parametrize("override", ["replica=node", "outer_momentum=0.5", "outer_learning_rate=0.5"])
def test_nor_how_its_replicas_meet(load, override):
    local = "distributed.sync_every=4"
    before, after = to_dict(load(local)), to_dict(load(local, f"distributed.{override}"))
    assert resume_conflicts(before, after, 2, 2) == [f"distributed.{override.split('=')[0]}"]


def test_a_resumed_run_may_not_change_when_it_stops(load):
    evaluated = to_dict(load("evaluation.eval_steps=5", "data.val_set_size=9"))
    patient = to_dict(load("evaluation.eval_steps=5", "data.val_set_size=9", "evaluation.early_stopping_patience=2"))
    assert resume_conflicts(evaluated, patient, 1, 1) == ["evaluation.early_stopping_patience"]


def test_a_resumed_run_may_split_its_batch_otherwise_as_long_as_the_product_stays(load):
    halved = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    assert conflicts(load, *halved) == []
    assert conflicts(load, "train.per_device_train_batch_size=2", processes=(1, 2)) == []
    (sentence,) = conflicts(load, processes=(1, 2))
    assert "took 4 × 1 × 1 = 4 rows and would now take 4 × 1 × 2 = 8" in sentence
    (sentence,) = conflicts(load, "train.gradient_accumulation_steps=3")
    assert "4 × 3 × 1 = 12" in sentence


def test_every_key_is_explained_and_the_page_of_them_is_up_to_date():
    for section in fields(Config):
        for name, comment in config_reference.comments_of(type(getattr(Config(), section.name))).items():
            assert comment, f"{section.name}.{name} has no comment"
    assert config_reference.PAGE.read_text(encoding="utf-8") == config_reference.page(), (
        "python tests/config_reference.py writes it anew"
    )


def test_patterns_for_all_modules_may_be_the_only_budget(load):
    assert load("sora.sparse_lambda=null", "sora.budgets={attn: 2}").sora.budgets == {"attn": 2.0}


def test_all_keys_of_another_trainer_are_named_at_once(tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text("base_model: x\nlora_r: 8\ntrain: {neftune_noise_alpha: 5}\nsora: {r: 4}\nval_set_size: 0.1\n")
    with pytest.raises(UserError) as raised:
        load_config(file)
    first, *lines = str(raised.value).splitlines()
    assert first == "4 keys are not keys of the config:"
    assert lines[0] == f"  base_model in {file}: did you mean model.name_or_path?"
    assert [line.split()[0] for line in lines] == ["base_model", "lora_r", "val_set_size", "train.neftune_noise_alpha"]
    datasets = "[{path: a, ds_type: json}, {field_output: b}]"
    file.write_text(f"lora_model_dir: y\nlora_rank: 8\ndata: {{datasets: {datasets}}}\n")
    with pytest.raises(UserError) as raised:
        load_config(file)
    keys = ["lora_model_dir", "lora_rank", "data.datasets.0.ds_type", "data.datasets.1.field_output"]
    lines = str(raised.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == keys
    assert "did you mean model.adapter?" in lines[0] and "did you mean sora.r?" in lines[1]
    assert "set columns: {output: …}" in lines[3]
    with pytest.raises(UserError, match=r"not of the form section\.key=value; set model\.dtype: bfloat16"):
        load_config(file, ["bf16=true"])
