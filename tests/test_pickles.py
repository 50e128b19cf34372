"""Nothing in a run directory is unpickled, or executed in another way."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpointed import FILES
from checkpointed import interrupted as interrupted
from checkpointed import start as start
from conftest import ROOT
from small_runs import result

from sora_llm.config import yaml_text
from sora_llm.files import file_sha256


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


LURES = (
    # what torch, transformers, peft, accelerate and deepspeed would look for in such folders
    "pytorch_model.bin",
    "model.pt",
    "adapter_model.bin",
    "adapter.pt",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scaler.pt",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "training_args.bin",
    "latest",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "state.pkl",
    "dataset.npy",
    "zero_to_fp32.py",
    "__init__.py",
)


@pytest.fixture
def hostile(tmp_path: Path) -> Callable[[Path], None]:
    """Puts a pickle in a place; that it works is shown here."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "unpickled")))
    (tmp_path / "unpickled").rmdir()

    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pt", ".bin"):
            torch.save(Payload(tmp_path / "unpickled"), path)
        elif path.suffix == ".py":
            path.write_text(f"import os\nos.mkdir({str(tmp_path / 'unpickled')!r})\n")
        else:
            path.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))

    return put


def was_unpickled(tmp_path: Path) -> bool:
    return (tmp_path / "unpickled").exists()


def test_no_pickle_that_lies_in_a_run_directory_is_read(
    interrupted: Path,
    start: Callable[..., tuple[int, str]],
    hostile: Callable[[Path], None],
    tmp_path: Path,
    undisturbed: dict[int, Path],
) -> None:
    """In the newest checkpoint every file is one, and beside all others lie some that might be looked for."""
    newest = interrupted / "checkpoints" / "step-4"
    for name in FILES:
        hostile(newest / name)
    places = (newest, newest.with_name("step-3"), newest.parent, interrupted, interrupted / "adapter")
    for folder in (*places, newest.with_name("step-3") / "global_step3", interrupted / "trackers"):
        for name in LURES:
            if folder.name != "adapter":  # which must not look like somebody else's folder
                hostile(folder / name)
    code, output = start(interrupted)
    assert code == 0 and "skipped" in output and "step 3 of 6" in output
    assert not was_unpickled(tmp_path) and result(interrupted) == result(undisturbed[1])


@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors"])
def test_not_even_with_the_right_hash(
    interrupted: Path, start: Callable[..., tuple[int, str]], hostile: Callable[[Path], None], tmp_path: Path, name: str
) -> None:
    folder = interrupted / "checkpoints" / "step-4"
    hostile(folder / name)
    hashes = {each: file_sha256(folder / each) for each in ("adapter.safetensors", "state.json")}
    (folder / "COMPLETE").write_text(json.dumps(hashes, indent=1))
    code, output = start(interrupted)
    # a state that is no JSON is a damaged checkpoint; tensors that are none are found when the adapters are loaded
    assert code == (0 if name == "state.json" else 2) and "step-4" in output and "Traceback" not in output
    assert not was_unpickled(tmp_path)


@pytest.mark.parametrize(
    ("name", "code"),
    [("config.yaml", 2), ("env.json", 2), ("status.json", 0), ("metrics.jsonl", 0), ("ranks.jsonl", 0), (".lock", 0)],
)
def test_nor_in_the_other_files_of_a_run(
    interrupted: Path,
    start: Callable[..., tuple[int, str]],
    hostile: Callable[[Path], None],
    tmp_path: Path,
    name: str,
    code: int,
) -> None:
    hostile(interrupted / name)
    found, output = start(interrupted)
    assert found == code and "Traceback" not in output, output
    assert not was_unpickled(tmp_path)


def test_nor_does_yaml_make_objects(interrupted: Path, start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (interrupted / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'unpickled'}']\n")
    code, output = start(interrupted)
    assert code == 2 and "Traceback" not in output and not was_unpickled(tmp_path)


UNPICKLING = {
    "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load",
    "shelve.open", "marshal.loads", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "load_state", "load_checkpoint",
}  # fmt: skip


def test_nothing_in_the_package_reads_pickles() -> None:
    seen = 0
    for path in sorted((ROOT / "sora_llm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            seen += 1
            where, called = f"{path}:{node.lineno}", ast.unparse(node.func)
            if ast.unparse(node) == "yaml.load(text, Loader=Loader)":
                assert issubclass(yaml_text.Loader, yaml.SafeLoader)
                continue
            assert called not in UNPICKLING and called.rpartition(".")[2] not in UNPICKLING, where
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg == "allow_pickle" and is_true), where
                assert not (keyword.arg == "weights_only" and not is_true), where
    assert seen > 1000
