"""A config is read strictly: what is not valid ends in a sentence that helps."""

import pytest
from smallest_config import SMALLEST, TWO, message_of
from smallest_config import load as load

from sora_llm.config import load_config
from sora_llm.errors import UserError

BAD_OVERRIDES = [
    # unknown names
    ("sora.lamda_num=1", "did you mean sora.lambda_num?"),
    ("sora.learning_rate=1", "did you mean train.learning_rate?"),
    ("train.eval_batch_size=1", "did you mean evaluation.per_device_eval_batch_size?"),
    ("train.batch=1", "did you mean train.per_device_train_batch_size?"),
    ("train.adam=1", "allowed there: per_device_train_batch_size, gradient_accumulation_steps,"),  # of three keys
    ("trian.max_steps=3", "trian on the command line is not a key of the config; did you mean train?"),
    ("--train.max_steps=3", "did you mean train?"),
    ("data.datasets.0.typ=alpaca", "did you mean data.datasets.0.type?"),
    ("output.zzzz=1", "allowed there: output_dir, logging_steps"),
    ("evaluation.evaluation_strategy=steps", "set evaluation.eval_steps"),
    ("train.evaluation_strategy=steps", "set evaluation.eval_steps"),
    (
        "train.group_by_length=true",
        "leave it out; without data.sample_packing rows of similar length are batched together",
    ),
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
    (
        "train.learning_rate=1.0e+300",
        "train.learning_rate is 1e+300 on the command line; it must be at most 1e+30",
    ),
    ("sora.lora_alpha=1" + 40 * "0", "it must be at most 1e+30"),
    ("sora.budgets={q_proj: 1.0e+99}", "it must be at most 1e+30"),
    ("train.gradient_checkpointing=1", "it must be true or false"),
    ("quantization.load_in_4bit='yes'", "it must be true or false"),
    ("model.revision=123456", "it must be text or null (put it in quotes)"),
    ("data.datasets={path: x}", "it must be a list"),
    ("data.datasets=[x.jsonl]", "data.datasets.0 is 'x.jsonl' on the command line; it must be a mapping"),
    ("data.datasets.0.columns=[a]", "it must be a mapping of names to text"),
    ("data.datasets.0.columns={1: a}", "it must be a mapping of names to text"),
    ("output.report_to=none", "it must be a list ([] for none), each entry one of tensorboard, wandb"),
    # values of other trainers
    ("data.datasets.0.type=chat_template", "custom (write messages, or sharegpt for turns of from and value;"),
    ("data.datasets.0.type=chat_template.default", "(write messages, or"),
    ("data.val_set_size=0", "(null holds out no rows)"),
    ("train.max_steps=-1", "(null if train.num_train_epochs is set)"),
    ("output.report_to=wandb", "(write [wandb])"),
    ("evaluation.eval_steps=0.1", "(a number of steps, not a share of the run)"),
    ("data.datasets.0.type=input_output", "(write custom, with a function"),
    ("train.beta2=0.95", "did you mean train.adam_beta2?"),
    ("train.max_steps=-2", "it must be an integer >= 1 or null."),
    ("sora.exclude_modules=[q_proj]", "sora.target_modules names what gets an adapter"),
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
    ("train.min_lr_ratio=1", "a number >= 0 and < 1"),
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
    ("quantization.load_in_8bit=true", "are mutually exclusive"),
    ("data.datasets.0.columns={question: q}", "not a field of type alpaca; its fields are instruction, input, output"),
    ("data.datasets.0.separator='\\n'", "separator is only for type prompt_completion"),
]


@pytest.mark.parametrize(("override", "fragment"), BAD_OVERRIDES, ids=lambda value: value if "=" in value else "")
def test_a_bad_value_ends_in_a_sentence_that_says_what_to_do(load, override, fragment):
    assert fragment in message_of(load, override)


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


def test_all_keys_of_another_trainer_are_named_at_once(tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text("base_model: x\nlora_r: 8\ntrain: {neftune_noise_alpha: 5}\nsora: {r: 4}\nval_set_size: 0.1\n")
    with pytest.raises(UserError) as raised:
        load_config(file)
    first, *lines = str(raised.value).splitlines()
    assert first == "the config has 4 unknown keys:"
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


# -------------------------------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["data.val_set_size=5", "data.val_datasets=[{path: x}]"], "with data.val_datasets=null"),
        (["model.dtype=float32", "sora.dtype=bfloat16"], "needs model.dtype bfloat16, not float32"),
        (["train.warmup_steps=5", "train.warmup_ratio=0.1"], "both say how long the warm-up is; leave one out"),
        (["train.min_lr_ratio=0.1", "train.lr_scheduler_type=constant"], "does not fall; change one of them"),
        (["data.train_on_inputs=true", "data.train_on_last_turn_only=true"], "contradict each other"),
    ],
)
def test_values_that_do_not_go_together_are_named(load, overrides, fragment):
    assert fragment in message_of(load, *overrides)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["sora.target_rank=65", "sora.sparse_lambda=null"], "sora.target_rank (65.0, on the command line) is above"),
        (["sora.threshold=adaptive"], "needs a budget"),
        (["distributed.sync_every=8", "distributed.strategy=zero2"], "use strategy ddp (or auto), or sync_every 1"),
        (["distributed.replica=node"], "needs local updates; set distributed.sync_every above 1"),
        (["distributed.outer_momentum=0.9"], "needs local updates"),
        (["distributed.outer_learning_rate=0.7"], "needs local updates"),
        (
            ["sora.threshold=proxgen", "sora.sparse_lambda=null", "sora.target_rank=4"],
            "does not work with sora.target_",
        ),
        (["sora.consensus_at=0.1"], "sora.dense_ratio (0.1, by default) must be below sora.consensus_at (0.1, on the"),
        (["sora.min_rank=2"], "needs a budget"),
        (["sora.budgets={q_proj: 4}"], "needs a budget"),
        (["sora.sparse_lambda=null", "sora.target_rank=8", "sora.budgets={q_proj: 65}"], "is 65, above sora.r"),
        (["evaluation.early_stopping_patience=2"], "needs dev rows"),
    ],
)
def test_budgets_thresholds_and_phases_that_do_not_go_together_are_refused(load, overrides, fragment):
    assert fragment in message_of(load, *overrides)


STREAMED = "data.datasets=[{path: a.jsonl, streaming: true}]"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["data.datasets.0.type=custom"], "data.datasets.0 is of type custom and has no function"),
        (["data.datasets.0.function='a:b'"], "is only for type custom"),
        ([TWO % ("weight: 2", "")], "data.datasets.0 has weight and data.datasets.1 does not: its share of an epoch's"),
        ([TWO % ("type: alpaca", ", weight: 2")], "data.datasets.1 has weight and data.datasets.0 does not"),
        ([TWO % ("streaming: true", "")], "data.datasets.0 has streaming and data.datasets.1 does not"),
        ([TWO % ("weight: 0", ", weight: 1")], "data.datasets.0.weight is 0 on the command line; it must be"),
        (["data.val_datasets=[{path: x, weight: 1}]"], "data.val_datasets.0.weight is not for dev rows"),
        (["data.val_datasets=[{path: x, streaming: true}]"], "data.val_datasets.0.streaming is not for dev rows"),
        ([STREAMED, "train.max_steps=null", "train.num_train_epochs=1"], "set train.max_steps, and train.num_train_ep"),
        ([STREAMED, "data.val_set_size=10"], "data.val_set_size cannot hold out rows of streamed data sets"),
        ([STREAMED, "data.drop_duplicates=true"], "data.drop_duplicates would have to remember every row"),
    ],
)
def test_settings_of_data_sets_that_do_not_go_together_are_refused(load, overrides, fragment):
    assert fragment in message_of(load, *overrides)
