"""`sora-llm doctor`: what is sound passes, what is broken is named with a remedy, and nothing lasts for ever."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import linear4bit
from spawn import warm_deepspeed

from sora_llm import cli, extensions
from sora_llm.commands import checks, cmd_doctor
from sora_llm.commands.cmd_doctor import FAILED, OK, WARNING, CheckResult
from sora_llm.data.prepare import default_cache_dir
from sora_llm.extensions import NOT_BUILT

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.matrix
def test_a_sound_machine_is_ready(capsys):
    warm_deepspeed()
    code = cli.main(["doctor", "--json"])
    content = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in content["findings"]}
    assert found.keys() >= {"python", "packages", "devices", "compiler", "group", "nf4", "packing", "zero2"}
    bad = [finding for finding in found.values() if finding["state"] == FAILED]
    assert (code, content["ready"], bad) == (0, True, [])


def test_4bit_products_and_packing_are_right_here():
    checks.check_4bit(linear4bit(WEIGHT), WEIGHT)
    assert "isolated" in checks.packing()


class Broken(torch.nn.Module):
    """A layer of the right weights with one wrong product."""

    def __init__(self, forward: float, backward: float):
        super().__init__()
        self.forward_by, self.backward_by = forward, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 5:  # not when it is asked for its weights
            x = x.detach() * self.forward_by + (x - x.detach()) * self.backward_by
        return x @ WEIGHT.T


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Broken(1.01, 1.0), "forward"),
        (Broken(1.0, 1.01), "backward"),
        (linear4bit(WEIGHT + 0.3), "weights"),
    ],
)
def test_wrong_products_are_found(layer, said):
    checks.check_4bit(Broken(1.0, 1.0), WEIGHT)
    with pytest.raises(AssertionError, match=f"the {said} of a 4-bit layer"):
        checks.check_4bit(layer, WEIGHT)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that trials can be."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


@pytest.mark.parametrize("name", ["nf4", "group"])
def test_a_trial_that_hangs_is_ended_with_all_it_started(scripts, name, monkeypatch):
    (scripts / "hangs.py").write_text(
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(scripts)!r}, f'pid-{{child.pid}}').touch()\n"
        "time.sleep(600)"
    )
    num_children = 2 if name == "group" else 1

    def pids() -> list[int]:
        return [int(path.name.removeprefix("pid-")) for path in scripts.glob("pid-*")]

    # its time is up as soon as all have started, however long that takes
    clock = SimpleNamespace(monotonic=lambda: 7.0 * (len(pids()) == num_children), sleep=time.sleep)
    monkeypatch.setattr(cmd_doctor, "time", clock)
    found = cmd_doctor.run_check(name, 6.0, "the remedy", module="hangs")
    assert found == CheckResult(name, FAILED, "no result within 6 s", "the remedy")
    assert len(pids()) == num_children
    begin = time.monotonic()
    while any(_runs(pid) for pid in pids()):
        assert time.monotonic() - begin < 120
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_trial_says_what_it_found_in_a_world_of_its_own(scripts, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (scripts / "says.py").write_text(
        "import json, os\n"
        "assert 'ACCELERATE_USE_CPU' not in os.environ\n"
        "print('noise'); print(json.dumps({'said': os.environ.get('WORLD_SIZE', 'alone')}))"
    )
    assert cmd_doctor.run_check("group", 60, "", module="says") == CheckResult("group", OK, "2")
    assert cmd_doctor.run_check("nf4", 60, "", module="says") == CheckResult("nf4", OK, "alone")


def test_a_trial_that_fails_says_why_for_both_processes(scripts):
    (scripts / "fails.py").write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0': time.sleep(600)\n"
        "print('noise'); sys.exit('the network is gone')"
    )
    found = cmd_doctor.run_check("group", 60, "the remedy", module="fails")
    assert found == CheckResult("group", FAILED, "the network is gone", "the remedy")


def test_one_failure_makes_the_exit_code_and_is_shown_with_its_remedy(monkeypatch, capsys):
    findings = [
        CheckResult("a", OK, "fine"),
        CheckResult("b", FAILED, "torn", "mend it"),
        CheckResult("c", WARNING, "old"),
    ]
    monkeypatch.setattr(cmd_doctor, "examine", lambda _: iter(findings))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "failed   b" in shown and "→ mend it" in shown and shown.endswith("not ready: b\n")
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][1]["remedy"] == "mend it"
    monkeypatch.setattr(cmd_doctor, "examine", lambda _: iter(f for f in findings if f.state != FAILED))
    assert cli.main(["doctor"]) == 0


def test_every_trial_has_the_time_that_is_given(monkeypatch, capsys):
    limits = {}

    def trial(name: str, time_limit: float, remedy: str) -> CheckResult:
        limits[name] = time_limit
        return CheckResult(name, OK, "fine")

    monkeypatch.setattr(cmd_doctor, "run_check", trial)
    for given, expected in ((["--time-limit", "7"], 7.0), ([], 300.0)):
        limits.clear()
        cli.main(["doctor", *given])
        assert limits == dict.fromkeys(("devices", "group", "nf4", "packing", "zero2"), expected)
    capsys.readouterr()
    for text in ("0", "-1", "nan"):
        assert cli.main(["doctor", "--time-limit", text]) == 2
        heard = capsys.readouterr()
        assert not heard.out and f"--time-limit is {text}; it is a number of seconds above 0" in heard.err


def test_a_user_without_a_home_is_a_finding(monkeypatch):
    """As in a container that runs under a number without a name."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cmd_doctor.Path, "home", homeless)
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cmd_doctor, "run_check", lambda name, *_: CheckResult(name, OK, "fine"))
    found = {finding.name: finding for finding in cmd_doctor.examine(60.0)}
    assert found["caches"].state == FAILED and "set HOME or XDG_CACHE_HOME" in found["caches"].said


def test_a_machine_without_a_compiler_trains_all_but_zero(monkeypatch, capsys):
    states, said = {"zero2": FAILED}, [f"{NOT_BUILT}: c++: not found"]
    monkeypatch.setattr(cmd_doctor, "run_check", lambda name, *_: CheckResult(name, states.get(name, OK), said[0]))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "warning  zero2" in shown and shown.count("apt install g++") == 2 and said[0] in shown
    assert shown.endswith("ddp; not under ZeRO on the CPU\n")
    states["nf4"] = FAILED
    assert cli.main(["doctor"]) == 1 and capsys.readouterr().out.endswith("not ready: nf4\n")
    monkeypatch.setattr(cmd_doctor, "compiler", lambda: CheckResult("compiler", OK, "g++ and ninja"))
    assert cli.main(["doctor"]) == 1 and capsys.readouterr().out.endswith("not ready: nf4, zero2\n")


def test_a_step_that_fails_for_another_reason_is_a_failure_without_a_compiler_too(monkeypatch, capsys):
    said = "a step under ZeRO-2 is not the step of one process (off by 3.0e-01)"
    monkeypatch.setattr(
        cmd_doctor, "run_check", lambda name, *_: CheckResult(name, FAILED if name == "zero2" else OK, said)
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert f"failed   zero2          {said}" in shown and shown.endswith("not ready: zero2\n")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("Unable to JIT load the deepspeed_shm_comm op due to ninja not being installed.", "due to ninja"),
        (
            "Error building extension 'deepspeed_shm_comm': [1/3] c++ -c x\n/bin/sh: 1: c++: not found\nninja: ",
            "/bin/sh: 1",
        ),
        ("nccl: unhandled system error", None),
    ],
)
def test_the_trial_knows_a_failed_build_from_other_failures(monkeypatch, error, why):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(checks, "make_accelerator", fails)
    with pytest.raises(Exception) as raised:
        checks.zero2()
    assert str(raised.value).startswith(NOT_BUILT) == (why is not None)
    assert (why or error) in str(raised.value)


def test_missing_or_old_packages_are_named(monkeypatch):
    monkeypatch.setattr(
        cmd_doctor.metadata, "requires", lambda _: ["torch>=999", "nowhere>=1", "pytest; extra == 'dev'"]
    )
    *_, found = cmd_doctor.versions()
    assert found.state == FAILED and "torch is" in found.said and "nowhere is missing" in found.said
    assert "pytest" not in found.said
    monkeypatch.setattr(cmd_doctor.metadata, "requires", lambda _: ["torch>=1", "pytest>=1"])
    *_, found = cmd_doctor.versions()
    assert found.state == OK and "torch" in found.said


def test_a_full_disk_a_missing_compiler_and_a_stale_lock_are_found(tmp_path, monkeypatch):
    for free, state in ((0.5, FAILED), (5, WARNING), (500, OK)):
        usage = SimpleNamespace(free=free * 2**30, total=2**40)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert {found.state for found in cmd_doctor.disks()} == {state}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert str(default_cache_dir().parent) in next(iter(cmd_doctor.disks())).said, "where training puts its tokens"
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        assert cmd_doctor.compiler().state == WARNING and "apt install g++" in cmd_doctor.compiler().remedy
        (tmp_path / "my-g++").touch(mode=0o755)
        without.setenv("CXX", "my-g++ -v")
        assert cmd_doctor.compiler().state == OK
    monkeypatch.setattr(extensions.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "apt install python3-dev" in cmd_doctor.compiler().remedy
    monkeypatch.setattr(cmd_doctor, "locks_by_existence", lambda: True)
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert cmd_doctor.build_lock(tmp_path).state == OK  # somebody builds right now
    os.utime(lock, (time.time() - 7200,) * 2)
    found = cmd_doctor.build_lock(tmp_path)
    assert found.state == FAILED and found.remedy == f"rm {lock}"
