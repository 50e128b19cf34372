"""Several hosts by hand, as launch/README.md says: one launcher each, here both on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, shared
from runs import CONFIG, QUESTIONS, gsm8k_overrides
from spawn import end_group, environment, free_port, warm_deepspeed

TRAIN = ("-m", "sora_llm.train")
SECONDS = 300


def run_of_two_steps(folder: Path, strategy: str) -> list[str]:
    """configs/llama7b.yaml on stories260k and a few rows."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(shared("data/gsm8k_train.jsonl").read_text().splitlines(keepends=True)[:40]))
    small = {
        "model.dtype": "float32",
        "quantization.load_in_4bit": False,
        "sora.r": 8,
        "data.datasets": [{**QUESTIONS, "path": str(rows)}],
        "data.val_set_size": 4,
        "data.cache_dir": str(folder / "cache"),
        "train.max_steps": 2,
        "distributed.strategy": strategy,
        "output.report_to": [],
    }
    return [CONFIG, *gsm8k_overrides(folder / "run", **small)]


def on_two_hosts(folder: Path, commands: Sequence[Sequence[str]], **env: str) -> list[tuple[int | None, str]]:
    """(exit code, output) of each host's launcher, started at the same time; all they started is ended."""
    hosts = []
    for index, command in enumerate(commands):
        with (folder / f"host{index}.log").open("w") as log:
            hosts.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(HF_HOME=str(folder / "hf"), CUDA_VISIBLE_DEVICES="", **env),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + SECONDS
    while any(host.poll() is None for host in hosts) and time.monotonic() < deadline:
        time.sleep(0.1)
    codes = [host.poll() for host in hosts]
    for host in hosts:  # workers end by themselves when their launcher is gone
        end_group(host)
    return [(code, (folder / f"host{index}.log").read_text()) for index, code in enumerate(codes)]


def assert_one_world_of_two(folder: Path, hosts: list[tuple[int | None, str]], strategy: str) -> None:
    assert [code for code, _ in hosts] == [0, 0], hosts
    status = json.loads((folder / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2)
    env = json.loads((folder / "run/env.json").read_text())
    assert (env["num_processes"], env["strategy"]) == (2, strategy)
    assert json.loads((folder / "run/adapter/certificate.json").read_text())["passed"]
    assert f"{strategy} on 2 processes" in hosts[0][1] and "processes" not in hosts[1][1]


@pytest.mark.matrix
def test_torchrun_on_two_hosts_is_one_world(tmp_path: Path) -> None:
    run = run_of_two_steps(tmp_path, "ddp")
    world = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *world]
    hosts = on_two_hosts(tmp_path, [[*torchrun, f"--node-rank={rank}", *TRAIN, *run] for rank in (0, 1)])
    assert_one_world_of_two(tmp_path, hosts, "ddp")


def test_accelerate_on_two_hosts_is_one_world(tmp_path: Path) -> None:
    warm_deepspeed()
    run = run_of_two_steps(tmp_path, "zero2")
    world = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/multi_node.yaml", *world]
    launcher.append(f"--main_process_port={free_port()}")
    expected = {"SORA_EXPECTED_WORLD_SIZE": "2"}
    hosts = on_two_hosts(tmp_path, [[*launcher, f"--machine_rank={rank}", *TRAIN, *run] for rank in (0, 1)], **expected)
    assert_one_world_of_two(tmp_path, hosts, "zero2")


def sourced(command: str, **env: str) -> str:
    """What a command prints after launch/environment.sh."""
    script = f"set -euo pipefail; source launch/environment.sh; {command}"
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return result.stdout.removesuffix("\n")


def test_the_launchers_work_in_their_own_folder_whatever_cdpath_says(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    assert sourced("pwd", CDPATH=str(tmp_path)) == str(ROOT)


def test_the_python_to_use_may_have_a_blank_in_its_path(tmp_path: Path) -> None:
    python = tmp_path / "my python" / "python3"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    assert sourced("find_python", SORA_PYTHON=str(python)) == str(python)
