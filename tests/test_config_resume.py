"""What the config of a resumed run may change, and what it may not."""

import copy
import functools
import operator

import pytest
from smallest_config import load as load

from sora_llm.config import differing_keys, resume_conflicts, to_dict


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
        "train.torch_compile=true",
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
    (conflict,) = conflicts(load, override)
    key, _, value = override.partition("=")
    assert conflict.startswith(f"{key} (") and conflict.endswith(" here)")
    assert value in conflict.rpartition(" there, ")[2]


def test_the_values_of_a_key_that_must_not_change_are_named(load):
    assert conflicts(load, "train.max_steps=11") == ["train.max_steps (10 there, 11 here)"]
    columns = conflicts(load, "data.datasets.0.columns={output: reply}")
    assert columns == ["data.datasets.0.columns.output (nothing there, 'reply' here)"]
    assert conflicts(load, "sora.target_modules=[q_proj, v_proj]") == [
        "sora.target_modules ('all-linear' there, ['q_proj', 'v_proj'] here)"
    ]


def test_a_data_set_more_is_one_conflict_and_not_one_per_key_of_it(load):
    assert conflicts(load, "data.datasets=[{path: rows.jsonl}, {path: b, type: alpaca}]") == [
        "data.datasets (a list of 1 there, of 2 here)"
    ]


def test_a_config_with_nothing_in_common_does_not_fill_the_screen(load):
    keys = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
    overrides = [f"train.{key}=0.123" for key in keys]
    overrides += ["train.seed=8", "train.max_steps=99", "sora.r=3", "sora.lora_alpha=9", "model.dtype=float32"]
    found = conflicts(load, *overrides)
    assert len(found) == 9 and found[-1] == "3 other keys"


@pytest.mark.parametrize("override", ["replica=node", "outer_momentum=0.5", "outer_learning_rate=0.5"])
def test_nor_how_its_replicas_meet(load, override):
    local = "distributed.sync_every=4"
    before, after = to_dict(load(local)), to_dict(load(local, f"distributed.{override}"))
    (conflict,) = resume_conflicts(before, after, 2, 2)
    assert conflict.startswith(f"distributed.{override.split('=')[0]} (")


def test_a_resumed_run_may_not_change_when_it_stops(load):
    evaluated = to_dict(load("evaluation.eval_steps=5", "data.val_set_size=9"))
    patient = to_dict(load("evaluation.eval_steps=5", "data.val_set_size=9", "evaluation.early_stopping_patience=2"))
    assert resume_conflicts(evaluated, patient, 1, 1) == ["evaluation.early_stopping_patience (null there, 2 here)"]


def test_a_resumed_run_may_split_its_batch_otherwise_as_long_as_the_product_stays(load):
    halved = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    assert conflicts(load, *halved) == []
    assert conflicts(load, "train.per_device_train_batch_size=2", processes=(1, 2)) == []
    (sentence,) = conflicts(load, processes=(1, 2))
    assert "took 4 × 1 × 1 = 4 rows and would now take 4 × 1 × 2 = 8" in sentence
    (sentence,) = conflicts(load, "train.gradient_accumulation_steps=3")
    assert "4 × 3 × 1 = 12" in sentence


def test_a_checkpoint_of_a_version_without_a_setting_has_its_default(load):
    """Settings are added, also to data sets, and whole sections: earlier checkpoints lack them."""
    held_out = "data.val_datasets=[{path: dev.jsonl}]"
    now = to_dict(load(held_out))
    required = {"name_or_path", "datasets", "val_datasets", "path", "max_steps", "sparse_lambda", "output_dir"}
    required |= {"per_device_train_batch_size", "gradient_accumulation_steps"}

    def keys_of(mapping, *path):
        for name, value in mapping.items():
            if isinstance(value, dict) and name != "columns":
                if not required & value.keys():
                    yield (*path, name)
                yield from keys_of(value, *path, name)
            elif name in ("datasets", "val_datasets"):
                yield from keys_of(value[0], *path, name, 0)
            elif name not in required:
                yield (*path, name)

    for *path, name in keys_of(now):
        old = copy.deepcopy(now)
        functools.reduce(operator.getitem, path, old).pop(name)
        assert resume_conflicts(old, now, 1, 1) == [], (path, name)
