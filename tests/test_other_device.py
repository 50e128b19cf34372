"""No tensor is left on the CPU: a pretended accelerator (pretended_gpu.py) gives the same runs and answers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from runs import CONFIG, PLAIN, PRUNED, Finished, assert_same_end, gsm8k_overrides, start
from small_runs import delta_weights, interrupt
from spawn import TESTS, free_port, spawn
from torch import nn
from torch.utils import backend_registration

from sora_llm import ProxAdamW, RankScheduler, consensus_prune, export_adapter, inject_sora, parameter_groups

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no devices written in Python",
)
SCRIPT = str(TESTS / "pretended_gpu.py")
PRETENDED = (sys.executable, SCRIPT)
SHORT = {**PRUNED, "sora.consensus_at": 0.5, "train.max_steps": 10}
FLOAT32 = {"model.dtype": "float32", "quantization.load_in_4bit": False, "sora.lora_dropout": 0.05}
SAVED = {"output.save_steps": 4, "output.save_total_limit": None}


def train(launcher: tuple[str, ...], directory: Path, **values: Any) -> Finished:
    found = start(launcher, [CONFIG, *gsm8k_overrides(directory, **SHORT, **values)], directory)
    assert found.returncode == 0, found.output
    return found


def assert_ran_there(found: Finished, num_processes: int = 1) -> None:
    """A forward pass alone is some hundred operations; the probe of the device none."""
    counts = list(map(int, re.findall(r"(\d+) operations on the pretended GPU", found.stderr)))
    assert len(counts) == num_processes and min(counts) > 500, "it was on the CPU"


def train_there(directory: Path, **values: Any) -> Finished:
    found = train((*PRETENDED, "sora_llm.train"), directory, **values)
    assert_ran_there(found)
    return found


@pytest.fixture(scope="module")
def float32_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train_there(tmp_path_factory.mktemp("there") / "float32", **FLOAT32, **SAVED)


@pytest.fixture(scope="module")
def nf4_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    values = {"sora.lora_dropout": 0.05, "output.export_layout": "merged", "train.gradient_accumulation_steps": 2}
    return train_there(tmp_path_factory.mktemp("there") / "nf4", **values)


def refusals() -> list[str]:
    """What the device answers to tensors of the CPU: in a sum, a layer, as values, indexed by it, in a collective."""
    import pretended_gpu

    pretended_gpu.prepare()
    there, here = torch.ones(2, device="gpu"), torch.ones(2)
    assert (there + there).sum().item() == 4
    there[(places := torch.tensor([0, 1]))] += there  # an index may be on the CPU
    layer, answers = nn.Linear(2, 2).to("gpu"), []
    for mix in (
        lambda: there + here,
        lambda: layer(here),
        lambda: there.index_put_((places,), here),
        lambda: here[places.to("gpu")],
        lambda: torch.distributed.all_reduce(here),
    ):
        with pytest.raises(RuntimeError) as refused:
            mix()
        answers.append(str(refused.value))
    return answers


def test_the_device_refuses_tensors_of_the_cpu() -> None:
    (answers,) = spawn("test_other_device:refusals", 1)
    *mixed, collective = answers
    assert [answer.startswith("Expected all tensors to be on the same device") for answer in mixed] == [True] * 4
    assert collective.startswith("No backend type associated with device type cpu")


def test_a_run_there_is_the_run_on_a_cpu(float32_run: Finished, tmp_path: Path) -> None:
    assert_same_end(float32_run, train(PLAIN, tmp_path / "cpu", **FLOAT32))


def test_a_resumed_run_there_is_the_uninterrupted_one(float32_run: Finished, tmp_path: Path) -> None:
    directory = interrupt(float32_run.directory, tmp_path / "resumed", 4)
    resumed = train_there(directory, **FLOAT32, **SAVED)
    assert "step 4 of 10" in resumed.output
    expected, own = delta_weights(float32_run.directory), delta_weights(directory)
    assert expected.keys() == own.keys()
    assert all(torch.equal(own[name], delta) for name, delta in expected.items())


def test_a_4bit_run_there_is_cut_exported_and_merged(nf4_run: Finished) -> None:
    first, *_, last = nf4_run.lines("metrics.jsonl")
    assert last["eval_loss"] < first["eval_loss"] - 0.5 and last["mean_rank"] <= 2
    assert nf4_run.json("adapter/certificate.json")["passed"] and "self-check of merged passed" in nf4_run.output


@pytest.mark.parametrize("sync_every", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_two_processes_there_are_two_on_the_cpu(sync_every: int, tmp_path: Path) -> None:
    values = {**FLOAT32, "distributed.strategy": "ddp", "distributed.sync_every": sync_every, **SAVED}
    values["distributed.check_every"] = 2

    def torchrun(*program: str) -> tuple[str, ...]:
        address = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
        return (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *address, *program)

    there = train(torchrun(SCRIPT, "sora_llm.train"), tmp_path / "there", **values)
    assert_ran_there(there, num_processes=2)
    assert_same_end(there, train(torchrun("-m", "sora_llm.train"), tmp_path / "cpu", **values))


def test_commands_there_read_the_run(nf4_run: Finished, tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        found = start((*PRETENDED, "sora_llm.__main__"), list(arguments), nf4_run.directory)
        assert found.returncode == 0, found.output
        assert_ran_there(found)
        return found.stdout

    directory = str(nf4_run.directory)
    evaluated = json.loads(command("evaluate", directory, "--target-rank", "1", "--json"))
    assert evaluated["adapter"]["loss"] == pytest.approx(nf4_run.lines("metrics.jsonl")[-1]["eval_loss"], rel=1e-4)
    (answer,) = json.loads(command("generate", directory, "--prompt", "How many?", "--compare", "--json"))["answers"]
    assert answer["base"] and answer["adapted"]
    assert "self-check passed" in command("export", directory, "--target-rank", "1", "--out", str(tmp_path / "small"))


def own_loop(device: str, folder: str) -> dict[str, torch.Tensor]:
    """B and A of every module after twelve steps on one batch, pruned to a mean rank of 2."""
    if device == "gpu":
        import pretended_gpu

        pretended_gpu.prepare()
    model = tiny_llama().to(device)
    torch.manual_seed(0)
    inject_sora(model, r=4, lora_alpha=8, lora_dropout=0.1)
    optimizer = ProxAdamW(parameter_groups(model, learning_rate=1e-2, gate_lr=1e-2))
    RankScheduler(model, optimizer, target_rank=2, dense_steps=3, sparsify_steps=9)
    token_ids = torch.arange(40, device=device).view(2, 20) % 16
    for _ in range(12):
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    consensus_prune(model, target_rank=2)
    export_adapter(model, folder, layout="ragged")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert {p.device.type for p in parameters.values()} == {device}
    return {name: p.cpu() for name, p in parameters.items()}


def test_a_loop_of_ones_own_there_is_the_loop_on_a_cpu(tmp_path: Path) -> None:
    found, expected = (
        spawn("test_other_device:own_loop", 1, {"device": device, "folder": str(tmp_path / device)})[0]
        for device in ("gpu", "cpu")
    )
    assert found.keys() == expected.keys() and sum(p.numel() for p in found.values()) > 0
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-5)
