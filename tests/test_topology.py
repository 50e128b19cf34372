"""What the launcher says and what the config says make one strategy, or a sentence that names both."""

import contextlib
import json

import pytest
import torch.distributed as dist
import yaml
from conftest import ROOT

from sora_llm.distributed import group
from sora_llm.errors import RunFailed, UserError
from sora_llm.topology import (
    REDUCE_BUCKET_ELEMENTS,
    World,
    deepspeed_config,
    launched_world,
    read_deepspeed_config,
    refuse_lone_process,
    refuse_other_step,
    resolve_strategy,
)

ONE, TWO = World(1, 0, 0), World(2, 0, 0)
# What each launcher leaves in the environment (accelerate 1.15)
PLAIN = {"ACCELERATE_MIXED_PRECISION": "no"}
MULTI = {**PLAIN, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
DEEPSPEED = {
    **MULTI,
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}
ZERO = ["zero1", "zero2", "zero3"]


def resolve(strategy, world=TWO, environ=MULTI, dtype="bfloat16"):
    return resolve_strategy(strategy, world, environ, dtype)


def file_with(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# ----- the world ------------------------------------------------------------------------------------------------------


def test_the_world_is_what_the_launcher_announced():
    assert launched_world({}) == World(1, 0, 0)
    assert launched_world({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}) == World(8, 5, 1)
    assert launched_world({"WORLD_SIZE": "2", "RANK": "1"}) == World(2, 1, 1)
    assert launched_world({"WORLD_SIZE": "2", "RANK": "0"}).is_main
    assert not launched_world({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}).is_main


def test_several_little_worlds_instead_of_one_are_noticed():
    with pytest.raises(UserError, match=r"started 2 processes but SORA_EXPECTED_WORLD_SIZE is 4"):
        launched_world({"WORLD_SIZE": "2", "RANK": "0", "SORA_EXPECTED_WORLD_SIZE": "4"})
    with pytest.raises(UserError, match="started 1 process but"):
        launched_world({"SORA_EXPECTED_WORLD_SIZE": "4"})
    assert launched_world({"WORLD_SIZE": "4", "RANK": "0", "SORA_EXPECTED_WORLD_SIZE": "4"}).num_processes == 4


ALONE_OF_TWO = {**PLAIN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("told", "launcher"),
    [
        (PLAIN, {"HOME": "/"}),
        ({**MULTI, **ALONE_OF_TWO}, {"HOME": "/"}),
        ({"MASTER_ADDR": "node1"}, {"HOME": "/"}),
        ({**ALONE_OF_TWO, "MASTER_ADDR": "node1"}, {"MASTER_ADDR": "node1"}),
        (ALONE_OF_TWO, {}),
    ],
    ids=["one was asked for", "a group", "no launcher", "an address from before it", "nothing can be read"],
)
def test_one_process_is_none_too_few_unless_its_launcher_says_so(told, launcher):
    refuse_lone_process(told, told, launcher)
    refuse_lone_process({**told, "MASTER_ADDR": "set by a script"}, PLAIN, launcher)


@pytest.mark.parametrize("launcher", [{"HOME": "/"}, {"MASTER_ADDR": "node1"}])
def test_one_process_of_several_that_were_asked_for_is_refused(launcher):
    with pytest.raises(UserError, match=r"started only this one.*--multi_gpu"):
        refuse_lone_process(ALONE_OF_TWO, ALONE_OF_TWO, launcher)


def test_a_world_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="whole numbers"):
        launched_world({"WORLD_SIZE": "two"})


# ----- the strategy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, PLAIN])
def test_one_process_runs_any_strategy_and_auto_is_none(environ):
    assert resolve("auto", ONE, environ) == "none"
    for strategy in ("none", "ddp", *ZERO):
        assert resolve(strategy, ONE, environ) == strategy


@pytest.mark.parametrize("environ", [MULTI, TORCHRUN], ids=["--multi_gpu", "torchrun"])
def test_a_plain_launch_of_several_processes_carries_any_strategy_but_none(environ):
    assert resolve("auto", TWO, environ) == "zero2"
    for strategy in ("ddp", *ZERO):
        assert resolve(strategy, TWO, environ) == strategy
    with pytest.raises(UserError, match=r"distributed\.strategy is none .* 2 processes"):
        resolve("none", TWO, environ)


@pytest.mark.parametrize("world", [ONE, TWO])
def test_use_deepspeed_without_a_stage_states_none(world):
    assert resolve("auto", world, DEEPSPEED) == "zero2"
    for strategy in ZERO:
        assert resolve(strategy, world, DEEPSPEED) == strategy


@pytest.mark.parametrize("strategy", ["none", "ddp"])
def test_use_deepspeed_carries_neither_none_nor_ddp(strategy):
    with pytest.raises(UserError, match=f"distributed.strategy is {strategy} .*--use_deepspeed"):
        resolve(strategy, TWO, DEEPSPEED)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("how", ["variable", "file"])
def test_a_stated_stage_is_followed_by_auto_and_contradicted_by_no_other(tmp_path, stage, how):
    if how == "variable":
        environ = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    else:
        path = file_with(tmp_path, {"zero_optimization": {"stage": stage}})
        environ = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": path}
    assert resolve("auto", TWO, environ) == f"zero{stage}"
    for strategy in ZERO:
        if strategy == f"zero{stage}":
            assert resolve(strategy, TWO, environ) == strategy
        else:
            with pytest.raises(UserError, match=f"distributed.strategy is {strategy} .*sets ZeRO stage {stage}"):
                resolve(strategy, TWO, environ)


def test_a_config_file_without_a_stage_states_none(tmp_path):
    for content in ({}, {"zero_optimization": {"stage": "auto"}}):
        environ = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": file_with(tmp_path, content)}
        assert resolve("zero3", TWO, environ) == "zero3"
        assert resolve("auto", TWO, environ) == "zero2"


@pytest.mark.parametrize("stage", ["0", "4", "two"])
def test_stages_that_do_not_exist_are_refused(stage):
    with pytest.raises(UserError, match=f"sets ZeRO stage {stage}"):
        resolve("auto", TWO, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})


def test_optimizer_offload_is_refused_wherever_it_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="optimizer offload to cpu"):
        resolve("zero2", TWO, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})
    with pytest.raises(UserError, match="parameter offload to cpu"):  # which accelerate would drop in silence
        resolve("zero3", TWO, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"})
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    path = file_with(tmp_path, offload)
    with pytest.raises(UserError, match="offloads the optimizer"):
        resolve("zero2", TWO, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": path})
    with pytest.raises(UserError, match="offloads the optimizer"):
        deepspeed_config("zero2", max_grad_norm=1.0, adapter_dtype="float32", user_config=offload)


def test_fsdp_is_refused():
    with pytest.raises(UserError, match="FSDP"):
        resolve("auto", TWO, {**MULTI, "ACCELERATE_USE_FSDP": "true"})


@pytest.mark.parametrize("environ", [PLAIN, MULTI, DEEPSPEED], ids=["plain", "multi", "deepspeed"])
@pytest.mark.parametrize(
    ("dtype", "same", "others"),
    [("bfloat16", "bf16", ["fp16", "fp8"]), ("float16", "fp16", ["bf16"]), ("float32", "no", ["bf16", "fp16"])],
)
def test_a_stated_precision_must_be_the_configs_and_no_is_no_statement(environ, dtype, same, others):
    for stated in (same, "no"):
        assert resolve("zero2", TWO, {**environ, "ACCELERATE_MIXED_PRECISION": stated}, dtype) == "zero2"
    for stated in others:
        with pytest.raises(UserError, match=f"--mixed_precision {stated} but model.dtype is {dtype}"):
            resolve("zero2", TWO, {**environ, "ACCELERATE_MIXED_PRECISION": stated}, dtype)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps to 4 but .*_steps is 2"),
        ({"GRADIENT_CLIPPING": "0.5"}, r"gradient_clipping to 0.5 but train.max_grad_norm is 0\b"),
        ({"GRADIENT_CLIPPING": "much"}, "gradient_clipping to much but"),
        ({"GRADIENT_ACCUMULATION_STEPS": "2", "GRADIENT_CLIPPING": "None"}, None),
        ({"GRADIENT_ACCUMULATION_STEPS": "1", "GRADIENT_CLIPPING": "1.0"}, None),  # its defaults
        ({}, None),
    ],
)
def test_what_the_launcher_states_of_a_step_is_what_the_config_says(stated, said):
    environ = {**DEEPSPEED, **{f"ACCELERATE_{key}": value for key, value in stated.items()}}
    refused = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with refused:
        refuse_other_step(environ, gradient_accumulation_steps=2, max_grad_norm=None)


# ----- the DeepSpeed config -------------------------------------------------------------------------------------------


def config(strategy="zero2", max_grad_norm=1.0, adapter_dtype="float32", user_config=None):
    return deepspeed_config(strategy, max_grad_norm=max_grad_norm, adapter_dtype=adapter_dtype, user_config=user_config)


@pytest.mark.parametrize(("strategy", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_our_config_has_the_stage_the_clip_and_every_precision_stated(strategy, stage):
    ours = config(strategy)
    assert ours["zero_optimization"]["stage"] == stage
    assert ours["gradient_clipping"] == 1.0 and config(max_grad_norm=None)["gradient_clipping"] == 0
    assert ours["bf16"]["enabled"] is False and ours["fp16"]["enabled"] is False
    assert config(adapter_dtype="bfloat16")["bf16"]["enabled"] is True
    assert ours["zero_allow_untested_optimizer"] is True
    assert ours["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET_ELEMENTS < 10**8, "it is allocated whole"
    assert ours["gradient_accumulation_steps"] == ours["train_micro_batch_size_per_gpu"] == 1


def test_a_users_other_keys_are_kept_and_auto_and_equal_ones_are_no_conflict():
    user = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5000},
        "data_types": {"grad_accum_dtype": None},
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
    }
    merged = config(user_config=user)
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5000}
    assert merged["gradient_clipping"] == 1.0 and merged["bf16"]["enabled"] is False
    assert merged["fp16"] == {"enabled": False, "loss_scale": 0} and merged["wall_clock_breakdown"] is True
    assert config(user_config={}) == config()
    assert config()["steps_per_print"] > 10**6 and config(user_config={"steps_per_print": 10})["steps_per_print"] == 10


@pytest.mark.parametrize(
    ("user", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage to 3 but this run needs 2"),
        ({"gradient_clipping": 0.3}, r"gradient_clipping to 0\.3, .* remove it there, and set train\.max_grad_norm"),
        ({"train_micro_batch_size_per_gpu": 4}, r"to 4, .* set train\.per_device_train_batch_size"),
        ({"communication_data_type": "fp16"}, "communication_data_type to 'fp16', which would change gradients"),
        *(
            (
                {"data_types": {"grad_accum_dtype": dtype}},
                f"data_types.grad_accum_dtype to '{dtype}', which would change",
            )
            for dtype in ("bf16", "fp16", "auto")
        ),
        ({"communication_data_type": "auto"}, "communication_data_type to 'auto', which would change gradients"),
        ({"optimizer": None}, r"sets optimizer to None, .* set train\.learning_rate"),
        ({"compute_grad_norm": False}, "compute_grad_norm to False, which would change gradients"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled to True"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled to True"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer to False"),
        ({"zero_optimization": 2}, "zero_optimization to 2; it must be a JSON object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer to 'cpu'; it must be a JSON object"),
        ({"bf16": True}, "bf16 to True"),
        ({"optimizer": {"type": "AdamW"}}, r"sets optimizer, .* set train\.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, r"sets scheduler, .* set train\.lr_scheduler_type"),
    ],
)
def test_a_key_that_contradicts_the_run_is_named(user, named):
    with pytest.raises(UserError, match=named):
        config(user_config=user)


def test_an_unreadable_deepspeed_config_is_bad_input(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_deepspeed_config(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match="not valid JSON"):
        read_deepspeed_config(file_with(tmp_path, "{stage: 2}"))
    with pytest.raises(UserError, match="JSON object"):
        read_deepspeed_config(file_with(tmp_path, "[1]"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        read_deepspeed_config(str(tmp_path / "binary.json"))
    assert read_deepspeed_config(file_with(tmp_path, {"a": 1})) == {"a": 1}
    stage_at_the_wrong_place = file_with(tmp_path, {"zero_optimization": 3})
    with pytest.raises(UserError, match="zero_optimization to 3"):
        resolve("auto", TWO, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": stage_at_the_wrong_place})


def test_local_updates_take_ddp_and_refuse_a_launcher_whose_processes_step_together():
    def local(strategy, world=TWO, environ=MULTI):
        return resolve_strategy(strategy, world, environ, "bfloat16", sync_every=8)

    assert local("auto") == local("ddp") == "ddp"
    assert local("auto", ONE, PLAIN) == "none"
    with pytest.raises(UserError, match=r"sync_every is 8 .* --use_deepspeed, .*; launch with --multi_gpu"):
        local("auto", TWO, DEEPSPEED)


def test_an_option_of_a_users_file_reaches_the_engine_of_a_run(ground, tmp_path):
    name, file = "deepspeed config", file_with(tmp_path, {"zero_optimization": {"reduce_bucket_size": 1000}})
    faults = [{"place": "step", "do": "deepspeed config"}, {"place": "step", "do": "raise"}]
    options = {"distributed.strategy": "zero2", "distributed.deepspeed_config": file}
    assert ground.codes(name, faults=faults, **options) == [1]
    given = json.loads((ground.run_dir(name).parent / "step-1.0").read_text())
    assert given["zero_optimization"] == {**config()["zero_optimization"], "reduce_bucket_size": 1000}
    assert given["gradient_clipping"] == config()["gradient_clipping"]


# ----- the launchers' files, and the group ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "one_node", "multi_node"])
def test_topologies_leave_strategy_and_precision_to_the_run(name: str) -> None:
    topology = yaml.safe_load((ROOT / f"launch/{name}.yaml").read_text())
    assert topology["distributed_type"] == "MULTI_GPU" and topology["mixed_precision"] == "no"
    assert topology["rdzv_backend"] == "static" and topology["use_cpu"] is False
    assert not {key for key in topology if key.startswith(("deepspeed", "fsdp"))}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (dist.DistNetworkError("failed to recv, got 0 bytes\n#0 frames"), r"process 1 .* could not form a group of 2"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:47001"),
            "could not form",
        ),
        (RuntimeError("CUDA driver initialization failed"), None),
    ],
)
def test_a_group_that_cannot_be_formed_is_a_sentence(
    error: RuntimeError, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_options: object) -> None:
        raise error

    monkeypatch.setattr(group, "Accelerator", refuse)
    world = World(num_processes=2, process_index=1, local_process_index=0)
    with pytest.raises(RunFailed if sentence else RuntimeError, match=sentence or "CUDA driver") as raised:
        group.make_accelerator("ddp", world)
    assert "frames" not in str(raised.value)
