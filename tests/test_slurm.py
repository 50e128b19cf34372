"""launch/slurm.sbatch: its decisions with a pretended Slurm, and (`-m slurm`) whole runs on a real one.

The real one is two nodes on this machine (tests/slurm/up.sh): it needs root, installs packages and writes /etc/slurm,
so it runs only where SORA_TEST_SLURM=1 says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, shared
from runs import CONFIG, QUESTIONS, gsm8k_overrides
from slurm.cluster import Cluster, Job, variables_of
from spawn import warm_deepspeed

on_a_real_slurm = pytest.mark.slurm
TWO_NODES = ("--nodes=2", "--time=60")
STEPS, SAVE_STEPS = 60, 20


# ----- decisions, with a pretended Slurm ------------------------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
# keeps what it was asked for, then does what the test wants a run to do
printf '%s\\n' "$@" >"$FOLDER/srun.args"
env >"$FOLDER/srun.env"
eval "$RUN"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf 'node01\\nnode02\\n' ;;
  "show job") echo "JobId=$3 JobState=RUNNING $JOB" ;;
  requeue*) echo "$2" >>"$FOLDER/requeued" ;;
esac
"""


class PretendedSlurm:
    """What launch/slurm.sbatch sees of a job: commands, variables, a run directory, and `run`, the life of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def begin(
        self,
        run: str,
        *overrides: str,
        job: str = "Reason=None PreemptTime=None",
        script: str = "slurm.sbatch",
        **env: str,
    ) -> subprocess.Popen[str]:
        """Start the batch script."""
        variables = {
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
            "FOLDER": str(self.folder),
            "RUN": f"run_dir={self.run_dir}; logs={self.folder}/slurm-123\n{STATUS}\n{run}",
            "JOB": job,
            "SLURM_JOB_ID": "123",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[01-02]",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_JOB_CPUS_PER_NODE": "16,12(x3)",
            "SORA_LOGS": str(self.folder),
            **env,
        }
        command = ["bash", str(ROOT / "launch" / script), CONFIG, f"output.output_dir={self.run_dir}", *overrides]
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __call__(self, run: str, *overrides: str, **options: str) -> tuple[int, str]:
        """(exit code, output) of a batch script that nobody disturbs."""
        process = self.begin(run, *overrides, **options)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().split()) if path.exists() else 0

    @property
    def srun(self) -> list[str]:
        """The arguments of the last srun."""
        return (self.folder / "srun.args").read_text().splitlines()

    def option(self, name: str) -> str:
        """The value of one of accelerate's options."""
        return self.srun[self.srun.index(f"--{name}") + 1]

    def variable(self, name: str) -> str | None:
        """An environment variable of the last srun."""
        pairs = dict(line.split("=", 1) for line in (self.folder / "srun.env").read_text().splitlines() if "=" in line)
        return pairs.get(name)


STATUS = """
says() {
  mkdir -p "$run_dir"
  echo "{\\"state\\": \\"$1\\"}" >"$run_dir/.new"
  mv "$run_dir/.new" "$run_dir/status.json"
}
saves() { mkdir -p "$run_dir/checkpoints/step-$1"; touch "$run_dir/checkpoints/step-$1/COMPLETE"; }
"""


@pytest.fixture
def slurm(tmp_path: Path) -> PretendedSlurm:
    return PretendedSlurm(tmp_path)


def test_a_finished_run_ends_the_job(slurm: PretendedSlurm) -> None:
    assert slurm("says finished")[0] == 0 and slurm.requeued == 0
    code, output = slurm("exit 0")  # once more: nothing to do
    assert (code, slurm.requeued) == (0, 0) and "finished" in output


def test_every_option_is_given_and_one_task_per_node_has_all_of_it(slurm: PretendedSlurm) -> None:
    slurm("says finished", "sora.r=32", SLURM_GPUS_ON_NODE="8", SLURM_GPUS_PER_TASK="1", SORA_IFNAME="ib0")
    given_to_srun = {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--kill-on-bad-exit=1"}
    assert given_to_srun <= set(slurm.srun)
    given = ("num_machines", "num_processes", "gpu_ids", "rdzv_backend", "main_process_ip", "main_process_port")
    assert [slurm.option(name) for name in given] == ["2", "16", "all", "static", "node01", "20123"]
    given = ("mixed_precision", "dynamo_backend", "num_cpu_threads_per_process", "deepspeed_multinode_launcher")
    assert [slurm.option(name) for name in given] == ["no", "no", "1", "standard"]
    assert "--same_network" in slurm.srun
    assert Path(slurm.option("config_file")).read_text().count("MULTI_GPU") == 1
    assert slurm.srun[-4:] == [CONFIG, f"output.output_dir={slurm.run_dir}", "sora.r=32", slurm.srun[-1]]
    assert slurm.srun[-1] == f"output.output_dir={slurm.run_dir}"
    assert 'trap "" USR1' in " ".join(slurm.srun)
    expected = {
        "SORA_EXPECTED_WORLD_SIZE": "16",
        "SRUN_CPUS_PER_TASK": "12",
        "SLURM_GPUS_PER_TASK": None,
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
    }
    assert {name: slurm.variable(name) for name in expected} == expected


def test_without_gpus_one_process_runs_per_node_unless_asked_for_more(slurm: PretendedSlurm) -> None:
    slurm("says finished")
    assert slurm.variable("SORA_EXPECTED_WORLD_SIZE") == slurm.option("num_processes") == "2"
    assert slurm.variable("OMP_NUM_THREADS") == "12"
    slurm("says finished", SORA_PROCESSES_PER_NODE="3")
    assert slurm.variable("SORA_EXPECTED_WORLD_SIZE") == slurm.option("num_processes") == "6"
    assert slurm.variable("OMP_NUM_THREADS") == "4"


def test_a_run_that_died_is_started_again_as_long_as_it_gets_on(slurm: PretendedSlurm) -> None:
    for restart, step in enumerate((10, 20)):
        code, output = slurm(f"saves {step}; says failed; exit 1", SLURM_RESTART_COUNT=str(restart))
        assert (code, slurm.requeued) == (0, restart + 1), output
    assert slurm("says failed; exit 1", SLURM_RESTART_COUNT="2")[0] == 0 and slurm.requeued == 3
    assert slurm("saves 30; exit 137", SLURM_RESTART_COUNT="3")[0] == 0 and slurm.requeued == 4
    assert slurm("says failed; exit 1", SLURM_RESTART_COUNT="4")[0] == 0 and slurm.requeued == 5
    code, output = slurm("says failed; exit 1", SLURM_RESTART_COUNT="5")
    assert (code, slurm.requeued) == (1, 5) and "2 runs in a row ended without a new checkpoint" in output


def test_what_was_wrong_is_repeated_where_people_look(slurm: PretendedSlurm) -> None:
    noise = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "
    lines = ["sora_llm: process 1 on node02 died", "ValueError: unexpected", noise, "step 3/60 loss 1.0"]
    said = "\n".join(lines)
    _, output = slurm(f"cat >$logs/0-node01.log <<'END'\n{said}\nEND\nsays failed; exit 1")
    assert lines[0] in output and lines[1] in output
    assert noise not in output and "step 3" not in output


def test_restarts_have_a_limit(slurm: PretendedSlurm) -> None:
    code, output = slurm("saves 10; says failed; exit 1", SLURM_RESTART_COUNT="3", SORA_MAX_RESTARTS="3")
    assert (code, slurm.requeued) == (75, 0) and "SORA_MAX_RESTARTS is 3" in output
    code, output = slurm("touch $FOLDER/started", SLURM_RESTART_COUNT="4", SORA_MAX_RESTARTS="3")  # by Slurm itself
    assert code == 2 and "this is restart 4" in output and not (slurm.folder / "started").exists()


def test_bad_input_is_not_tried_again(slurm: PretendedSlurm) -> None:
    code, output = slurm("touch $FOLDER/started", "train.max_stepz=5")
    assert code == 2 and "max_steps" in output and not (slurm.folder / "started").exists()
    said = "sora_llm: data.datasets.0.path is not there\\n  exitcode  : 2 (pid: 71)"
    code, output = slurm(f"printf '{said}\\n' >$logs/0-node01.log; exit 1")
    assert (code, slurm.requeued) == (2, 0) and "data.datasets.0.path is not there" in output


def test_an_old_status_says_nothing_about_this_run(slurm: PretendedSlurm) -> None:
    slurm("says preempted; exit 1")
    code, output = slurm("exit 1")
    assert (code, slurm.requeued) == (0, 1) and "the run is not begun" in output


def test_who_stops_it_by_hand_does_not_get_it_back(slurm: PretendedSlurm) -> None:
    code, output = slurm("saves 7; says preempted; exit 1")
    assert (code, slurm.requeued) == (75, 0) and "stopped on request" in output


def test_what_slurm_preempts_within_a_grace_time_comes_back(slurm: PretendedSlurm) -> None:
    job = "Reason=None PreemptTime=2026-11-23T01:07:42"
    for restart in range(3):  # not even a checkpoint is asked for: it is not the run's fault
        assert slurm("says preempted; exit 1", job=job, SLURM_RESTART_COUNT=str(restart))[0] == 0
        assert slurm.requeued == restart + 1


def started(slurm: PretendedSlurm, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (slurm.folder / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


UNTIL_A_SIGNAL = """
trap 'cp "$run_dir/STOP" "$FOLDER/seen"; sleep 1; saves 7; says preempted; exit 1' USR1
trap 'saves 7; says preempted; exit 1' TERM
touch "$FOLDER/ready"
for i in {1..600}; do sleep 0.1; done
"""


def test_the_warning_before_the_time_limit_is_passed_on_and_the_job_comes_back(slurm: PretendedSlurm) -> None:
    process = slurm.begin(UNTIL_A_SIGNAL)
    started(slurm, process)
    for _ in range(3):  # however often: it waits for the run
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, slurm.requeued) == (0, 1), output
    assert output.count("the time limit is near") == 1 and "the run is preempted" in output
    assert (slurm.folder / "seen").read_text() == "slurm job 123\n"
    assert not (slurm.run_dir / "STOP").exists()


@pytest.mark.parametrize(("reason", "requeued"), [("None", 0), ("TimeLimit", 1)])
def test_what_was_cancelled_stays_so_and_what_ran_out_of_time_does_not(
    slurm: PretendedSlurm, reason: str, requeued: int
) -> None:
    process = slurm.begin(UNTIL_A_SIGNAL, job=f"Reason={reason}")
    started(slurm, process)
    for pid in (process.pid, child_of(process.pid)):  # as Slurm does: all processes of the job
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, slurm.requeued) == (143, requeued), output
    assert json.loads((slurm.run_dir / "status.json").read_text())["state"] == "preempted"


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_stop_file_of_an_earlier_job_is_removed_but_not_one_of_a_person(slurm: PretendedSlurm) -> None:
    run = "cp $run_dir/STOP $FOLDER/found 2>/dev/null; says failed; exit 1"
    slurm.run_dir.mkdir()
    (slurm.run_dir / "STOP").write_text("slurm job 99\n")
    slurm(run)
    assert not (slurm.folder / "found").exists()
    (slurm.run_dir / "STOP").touch()
    slurm(run)
    assert (slurm.folder / "found").exists()


@pytest.mark.parametrize(
    ("resume", "restart", "checkpoint", "added"),
    [
        ("never", "0", False, False),
        ("never", "1", False, True),  # its own first run has filled the run directory
        ("elsewhere/step-5", "1", False, False),
        ("elsewhere/step-5", "1", True, False),  # the trainer knows what came of it, and whether anything did
        ("elsewhere/step-5", "0", True, False),
    ],
)
def test_a_restart_goes_on_from_the_jobs_own_checkpoints(
    slurm: PretendedSlurm, resume: str, restart: str, checkpoint: bool, added: bool
) -> None:
    if checkpoint:
        (slurm.run_dir / "checkpoints/step-7").mkdir(parents=True)
        (slurm.run_dir / "checkpoints/step-7/COMPLETE").touch()
    slurm("says finished", f"output.resume={resume}", SLURM_RESTART_COUNT=restart)
    assert (slurm.srun[-1] == "output.resume=auto") == added


def test_an_image_is_for_pyxis(slurm: PretendedSlurm) -> None:
    """srun of the image reads the config too."""
    run = 'while [ "$1" != python ] && [ $# -gt 0 ]; do shift; done; [ $# = 0 ] && says finished || "$@"'
    code, output = slurm(run, SORA_IMAGE="/images/sora.sqsh", SORA_MOUNTS="/models:/models")
    assert code == 0, output
    assert "--container-image=/images/sora.sqsh" in slurm.srun
    logs = slurm.folder / "slurm-123"
    mounts = f"{ROOT}:{ROOT},{logs}:{logs},/models:/models,{slurm.run_dir}:{slurm.run_dir}"
    assert f"--container-mounts={mounts}" in slurm.srun


def test_outside_of_slurm_and_without_a_config_it_says_what_to_do(slurm: PretendedSlurm) -> None:
    code, output = slurm("", SLURM_JOB_ID="")
    assert code == 2 and "this is for sbatch" in output
    result = subprocess.run(["bash", ROOT / "launch/slurm_array.sbatch", CONFIG], capture_output=True, text=True)
    assert result.returncode == 2 and "this is for job arrays" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "seed", "run_dir", "length"),
    [
        ([], "3", "{run}/3", None),
        (["train.seed=42", "data.sequence_len=1{task}0"], "42", "{run}/3", "130"),
        (["output.output_dir={run}-{task}"], "3", "{run}-3", None),
        (["output.output_dir={run}-{task}", "output.output_dir={run}"], "3", "{run}/3", None),
    ],
)
def test_a_task_of_an_array_has_its_own_seed_and_run_directory(
    slurm: PretendedSlurm, overrides: list[str], seed: str, run_dir: str, length: str | None
) -> None:
    ids = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"}
    job = f"Command={ROOT}/launch/slurm_array.sbatch {CONFIG}"
    given = [text.replace("{run}", str(slurm.run_dir)) for text in overrides]
    code, output = slurm("exit 0", *given, job=job, script="slurm_array.sbatch", **ids)
    assert code == 0, output
    last = dict(word.split("=", 1) for word in slurm.srun[slurm.srun.index(CONFIG) + 1 :])
    assert (last["train.seed"], last.get("data.sequence_len")) == (seed, length)
    assert last["output.output_dir"] == run_dir.replace("{run}", str(slurm.run_dir))
    assert (slurm.folder / "slurm-120_3").is_dir()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [*(ROOT / "launch").glob("*.sbatch"), *(ROOT / "tests/slurm").glob("*.sh")]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ----- runs on a real Slurm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.environ.get("SORA_TEST_SLURM") != "1":
        pytest.skip("needs root, installs packages and writes /etc/slurm: set SORA_TEST_SLURM=1 on a machine for that")
    warm_deepspeed()
    folder = tmp_path_factory.mktemp("slurm")
    visible = [ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(os.environ["TORCH_EXTENSIONS_DIR"]), shared("data")]
    try:
        yield Cluster.start(folder, visible)
    finally:
        Cluster.stop()


def arguments(cluster: Cluster, run: str, **others: object) -> list[str]:
    """configs/llama7b.yaml on stories260k and a few rows: small steps in float32."""
    rows = cluster.folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(shared("data/gsm8k_train.jsonl").read_text().splitlines(keepends=True)[:60]))
    small = {
        "model.dtype": "float32",
        "quantization.load_in_4bit": False,
        "sora.r": 8,
        "data.datasets": [{**QUESTIONS, "path": str(rows)}],
        "data.val_set_size": 8,
        "data.cache_dir": str(cluster.folder / "cache"),
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": 1,
        "output.save_steps": SAVE_STEPS,
        "output.logging_steps": 1,
        "output.report_to": [],
    }
    return [CONFIG, *gsm8k_overrides(cluster.folder / run, **{**small, **others})]


def submit(cluster: Cluster, run: str, *options: str, **env: str) -> Job:
    return cluster.submit(run, *arguments(cluster, run), options=(*TWO_NODES, *options), **env)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Job:
    """A run that nobody interrupts."""
    job = submit(cluster, "undisturbed")
    job.wait_for_end()
    return job


@contextlib.contextmanager
def paused(job: Job) -> Iterator[int]:
    """One of its processes stands still, and so, soon, do all; gives the pid."""
    pid = job.training_processes()[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def assert_equal_to_undisturbed(job: Job, undisturbed: Job) -> None:
    """It finished with the same adapter, bit for bit, and wrote every step once."""
    assert job.status["state"] == "finished", job.story()
    assert job.adapter == undisturbed.adapter
    assert [line["step"] for line in job.metrics if "loss" in line] == list(range(1, STEPS + 1))
    assert [line.get("loss") for line in job.metrics] == [line.get("loss") for line in undisturbed.metrics]


@on_a_real_slurm
def test_two_nodes_train_one_world(undisturbed: Job) -> None:
    job = undisturbed
    assert job.state == "COMPLETED" and job.restarts == 0, job.story()
    assert job.status["state"] == "finished"
    env = json.loads((job.directory / "env.json").read_text())
    assert (env["num_processes"], env["strategy"]) == (2, "zero2")
    assert "zero2 on 2 processes" in job.log(0, "node01")
    assert "processes" not in job.log(0, "node02")  # it runs as the second process, not as another first one
    assert "finished" in job.output.read_text()


@on_a_real_slurm
def test_before_the_time_limit_it_saves_and_goes_on_in_a_new_run(cluster: Cluster, undisturbed: Job) -> None:
    job = submit(cluster, "time_limit", "--signal=B:USR1@600")
    job.wait_for_step(7)
    with paused(job):  # Slurm looks at time limits every 30 s
        job.update(TimeLimit=10)
        job.wait_for("the warning", lambda: "the time limit is near" in job.output.read_text(), 60)
    job.wait_for("the requeue", lambda: job.restarts == 1, 60)
    job.update(TimeLimit=60)
    (stopped_at,) = job.checkpoints()
    assert 7 <= stopped_at < SAVE_STEPS and job.status["state"] == "preempted"
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.restarts == 1 and job.resumed_from(1) == stopped_at
    assert not (job.directory / "STOP").exists()
    assert_equal_to_undisturbed(job, undisturbed)


@on_a_real_slurm
def test_a_cancelled_job_stays_cancelled_and_leaves_a_checkpoint(cluster: Cluster, undisturbed: Job) -> None:
    job = submit(cluster, "cancelled")
    job.wait_for_step(7)
    subprocess.run(["scancel", job.number], check=True)
    assert job.wait_for_end(60) == "CANCELLED", job.story()
    (stopped_at,) = job.checkpoints()
    assert stopped_at >= 7 and job.status["state"] == "preempted"
    with pytest.raises(AssertionError, match="not within 15 s"):  # a requeue would show after 5 s
        job.wait_for("life after death", lambda: job.state != "CANCELLED" or job.restarts, 15)

    again = submit(cluster, "cancelled")
    assert again.wait_for_end() == "COMPLETED", again.story()
    assert again.resumed_from(0) == stopped_at
    assert_equal_to_undisturbed(again, undisturbed)


@on_a_real_slurm
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_training_process_costs_a_restart(cluster: Cluster, undisturbed: Job, rank: int) -> None:
    job = submit(cluster, f"killed{rank}")
    job.wait_for_step(SAVE_STEPS + 2)
    os.kill(job.training_processes()[rank], signal.SIGKILL)
    job.wait_for("the requeue", lambda: job.restarts == 1, 60)
    assert f"process {rank} on node0{rank + 1} died" in job.status["error"], job.story()
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.restarts == 1 and job.resumed_from(1) == SAVE_STEPS
    assert_equal_to_undisturbed(job, undisturbed)


@on_a_real_slurm
@pytest.mark.parametrize("node", ["node01", "node02"])
def test_a_dead_node_costs_a_restart(cluster: Cluster, undisturbed: Job, node: str) -> None:
    job = submit(cluster, f"dead_{node}")
    job.wait_for_step(SAVE_STEPS + 2)
    cluster.kill_node(node)  # node01 is the one with the batch shell
    job.wait_for("the requeue", lambda: job.restarts == 1, 120)
    cluster.bring_back_nodes()
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.resumed_from(job.restarts) == SAVE_STEPS
    assert_equal_to_undisturbed(job, undisturbed)


@on_a_real_slurm
def test_a_preempted_job_saves_in_its_grace_time_and_comes_back(cluster: Cluster, undisturbed: Job) -> None:
    job = submit(cluster, "preempted", "--partition=spot")
    job.wait_for_step(7)
    more_important = ["sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    subprocess.run(more_important, check=True)
    job.wait_for("the requeue", lambda: job.restarts == 1, 60)
    assert "preempted by Slurm" in job.output.read_text(), job.story()
    (stopped_at,) = job.checkpoints()
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.restarts == 1 and job.resumed_from(1) == stopped_at
    assert_equal_to_undisturbed(job, undisturbed)


SHORT = {"train.max_steps": 2, "output.save_steps": 1}


@on_a_real_slurm
def test_a_stop_file_of_a_person_ends_the_job_with_a_checkpoint(cluster: Cluster) -> None:
    job = submit(cluster, "stopped")
    job.wait_for_step(3)
    (job.directory / "STOP").touch()
    assert job.wait_for_end() == "FAILED" and job.restarts == 0, job.story()
    assert job.status["state"] == "preempted" and job.checkpoints() == [job.status["step"]]
    assert "stopped on request" in job.output.read_text() and not (job.directory / "STOP").exists()


@on_a_real_slurm
def test_bad_input_is_said_once_in_the_jobs_own_output_and_not_tried_again(cluster: Cluster) -> None:
    missing = arguments(cluster, "bad", **{"data.datasets": [{"path": "nowhere.jsonl", "type": "alpaca"}]})
    job = cluster.submit("bad", *missing, options=TWO_NODES)
    assert job.wait_for_end() == "FAILED" and job.restarts == 0, job.story()
    assert job.output.read_text().count("nowhere.jsonl") == 1, job.story()
    assert not job.directory.exists()


@on_a_real_slurm
def test_nodes_that_do_not_find_each_other_are_refused(cluster: Cluster) -> None:
    """A DeepSpeed topology is one world thanks to one option; without it the trainer says what is wrong."""
    topology = cluster.folder / "deepspeed.yaml"
    topology.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\ndeepspeed_config: {}\n")
    option = "--deepspeed_multinode_launcher standard"
    original = (ROOT / "launch/slurm.sbatch").read_text()
    assert original.count(option) == 1
    broken = cluster.folder / "broken.sbatch"
    broken.write_text(original.replace(option, ""))
    job = cluster.submit(
        "little_worlds",
        *arguments(cluster, "little_worlds", **SHORT),
        options=TWO_NODES,
        script=broken,
        SORA_ACCELERATE_CONFIG=str(topology),
    )
    assert job.wait_for_end() == "FAILED" and job.restarts == 0, job.story()
    assert "a world of 1 processes but SORA_EXPECTED_WORLD_SIZE is 2" in job.output.read_text(), job.story()
    assert not (job.directory / "adapter").exists()

    job = cluster.submit(
        "deepspeed",
        *arguments(cluster, "deepspeed", **SHORT),
        options=TWO_NODES,
        SORA_ACCELERATE_CONFIG=str(topology),
    )
    assert job.wait_for_end() == "COMPLETED" and job.status["state"] == "finished", job.story()


@on_a_real_slurm
def test_every_gpu_has_a_process_however_it_was_asked_for(cluster: Cluster) -> None:
    """GPUs of which torch knows nothing, so that the processes run on the CPU."""
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=2")
    job = cluster.submit("gpus", *arguments(cluster, "gpus", **SHORT), options=options, SORA_IFNAME="eth0")
    processes = job.wait_for("four processes", lambda: len(p := job.training_processes()) == 4 and p, 120)
    assert {variables_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in processes.values()} == {"0,1"}
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert json.loads((job.directory / "env.json").read_text())["num_processes"] == 4


@on_a_real_slurm
def test_an_array_is_a_run_per_seed(cluster: Cluster) -> None:
    script = ROOT / "launch/slurm_array.sbatch"
    options = ("--array=1-2", "--nodes=1", "--gpus-per-node=1")
    array = cluster.submit("array", *arguments(cluster, "array", **SHORT), options=options, script=script)
    adapters = []
    for task in (1, 2):
        job = Job(f"{array.number}_{task}", array.directory / str(task), array.output, array.logs)
        assert job.wait_for_end() == "COMPLETED", job.story()
        assert f"seed: {task}\n" in (job.directory / "config.yaml").read_text()
        adapters.append(job.adapter)
    assert adapters[0] != adapters[1]
