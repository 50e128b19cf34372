"""The two-node Slurm that up.sh starts, and jobs of launch/slurm.sbatch on it, as a test sees them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LAB = Path("/run/sora_slurm")


def variables_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@dataclass(frozen=True)
class Cluster:
    """A running cluster.  Jobs are submitted from `folder`'s environment: nothing of ours on the PATH but SORA_ENV, and
    a home in which an accelerate config says the opposite of what is wanted."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, visible: Iterable[Path]) -> Cluster:
        """Start afresh; the folders `visible` are on every node although they lie in /tmp."""
        cls.stop()
        subprocess.run([ROOT / "tests/slurm/up.sh", folder, *visible], check=True, timeout=300)
        variables = {
            "PATH": f"{Path(sys.executable).parent}:$PATH",
            "PYTHONPATH": str(ROOT),
            "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        lines = [f'export {name}="{value}"\n' for name, value in variables.items()]
        (folder / "env.sh").write_text("".join(lines))
        default = folder / "home/.cache/huggingface/accelerate/default_config.yaml"
        default.parent.mkdir(parents=True)
        default.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: fp16\ngpu_ids: '0'\n"
            "num_machines: 1\nnum_processes: 7\nuse_cpu: true\ndeepspeed_config: {zero_stage: 3}\n"
        )
        return cls(folder)

    @staticmethod
    def stop() -> None:
        """End all of it, and the Slurm configuration."""
        subprocess.run([ROOT / "tests/slurm/down.sh"], check=True, timeout=60)

    @staticmethod
    def kill_node(name: str) -> None:
        """As after a power cut: no connection is closed any more, nothing on it goes on."""
        subprocess.run(["ip", "link", "delete", f"sora_{name}"], check=True, timeout=60)
        os.kill(int((LAB / f"{name}.pid").read_text()), signal.SIGKILL)

    @staticmethod
    def bring_back_nodes() -> None:
        """Start the nodes that died."""
        subprocess.run([ROOT / "tests/slurm/up.sh"], check=True, timeout=60)

    def submit(
        self, run: str, *arguments: str, options: Iterable[str] = (), script: Path | None = None, **env: str
    ) -> Job:
        """sbatch launch/slurm.sbatch `arguments`; `run` names the run directory that they say."""
        script = script or ROOT / "launch/slurm.sbatch"
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder / "home"),
            "SORA_ENV": str(self.folder / "env.sh"),
            "SORA_LOGS": str(self.folder),
            **env,
        }
        output = self.folder / f"{run}.out"
        command = ["sbatch", "--parsable", f"--output={output}", *options, str(script), *arguments]
        printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert printed.returncode == 0, printed.stderr
        return Job(printed.stdout.strip(), self.folder / run, output, self.folder)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    number: str
    directory: Path
    output: Path
    logs: Path

    def show(self) -> dict[str, str]:
        """What scontrol knows about it."""
        command = ["scontrol", "show", "job", "--oneliner", self.number]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def update(self, **fields: Any) -> None:
        """scontrol update."""
        pairs = [f"{key}={value}" for key, value in fields.items()]
        subprocess.run(["scontrol", "update", f"JobId={self.number}", *pairs], check=True, timeout=60)

    def log(self, restart: int, node: str) -> str:
        """What one node said in one run."""
        return (self.logs / f"slurm-{self.number}" / f"{restart}-{node}.log").read_text()

    @property
    def status(self) -> dict[str, Any]:
        """status.json, empty while there is none."""
        try:
            content: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return content

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    @property
    def adapter(self) -> bytes:
        """The weights that came out."""
        return (self.directory / "adapter/adapter_model.safetensors").read_bytes()

    def checkpoints(self) -> list[int]:
        """Steps of the complete ones."""
        return sorted(
            int(path.parent.name.split("-")[1]) for path in self.directory.glob("checkpoints/step-*/COMPLETE")
        )

    def training_processes(self) -> dict[int, int]:
        """The pid of every process of the world, by its rank; launchers are none."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = variables_of(int(folder.name))
            except OSError:  # it has ended meanwhile
                continue
            if b"sora_llm.train" in words and variables.get("SLURM_JOB_ID") == self.number and "RANK" in variables:
                found[int(variables["RANK"])] = int(folder.name)
        return found

    def wait_for(self, what: str, holds: Callable[[], Any], seconds: float) -> Any:
        """Wait until `holds` gives something true, which is returned."""
        deadline = time.monotonic() + seconds
        while not (value := holds()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:g} s\n{self.story()}")
            time.sleep(0.1)
        return value

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        self.wait_for(f"step {step}", lambda: self.status.get("step", 0) >= step, seconds)

    def wait_for_end(self, seconds: float = 240) -> str:
        """The state it ends in: COMPLETED, FAILED, CANCELLED, ..."""
        going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        state: str = self.wait_for("the end of the job", lambda: (s := self.state) not in going and s, seconds)
        return state

    def story(self) -> str:
        """Everything that was said, for a test that failed."""
        paths = [self.output, *sorted((self.logs / f"slurm-{self.number}").glob("*.log"))]
        said = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths if path.exists()]
        return "\n".join([str(self.show()), f"status {self.status}, checkpoints {self.checkpoints()}", *said])

    def resumed_from(self, restart: int) -> int | None:
        """The step from which that run went on, by what the main process said."""
        found = re.search(r"resuming from \S+step-(\d+)", self.log(restart, "node01"))
        return None if found is None else int(found[1])
