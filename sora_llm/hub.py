"""The hub: checks before a run, model card metadata, and the upload of a finished adapter.

The upload is a separate process (`python -m sora_llm.hub FOLDER REPOSITORY`): the hub's client waits for an answer
without a limit, and nothing that happens in it may affect a finished run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from sora_llm.errors import UserError

UPLOAD_SECONDS = 1800.0
POLL_SECONDS = 0.5
LOGIN = "`hf auth login`, or a token in HF_TOKEN"


def repository(hub_model_id: str | None, run_dir: Path) -> str:
    """The repository of a run: `hub_model_id`, else the run directory's own name, in the user's namespace.

    Raises:
        UserError: the hub does not allow such a name.
    """
    name = run_dir.absolute().name if hub_model_id is None else hub_model_id
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).split(": '")[0].rstrip(".")
        if hub_model_id is None:
            raise UserError(
                f"output.push_to_hub would name the repository after output.output_dir, but {name!r} is not a valid "
                f"name ({reason}); set output.hub_model_id"
            ) from None
        raise UserError(f"output.hub_model_id {name!r} is not a valid name or user/name ({reason})") from None
    return name


def check_target(hub_model_id: str | None, run_dir: Path) -> None:
    """UserError if the later upload cannot work: an invalid name, or the hub is switched off."""
    repository(hub_model_id, run_dir)
    if is_offline_mode():
        raise UserError(
            "output.push_to_hub is true and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) switches the hub off; unset it, "
            "or set output.push_to_hub to false and upload the adapter folder afterwards"
        )


def has_token() -> bool:
    """Whether this user is logged in to the hub."""
    return get_token() is not None


def card_metadata(base_model: str, library: str = "peft") -> str:
    """The YAML header of the model card of a model that `library` loads.  The hub refuses a base that is not a
    repository, such as a local folder."""
    try:
        validate_repo_id(base_model)
        on_hub = not Path(base_model).expanduser().exists()
    except HFValidationError:
        on_hub = False
    data = ModelCardData(
        library_name=library,
        base_model=base_model if on_hub else None,
        pipeline_tag="text-generation",
        tags=["lora", "sora"],
    )
    return data.to_yaml()


def push(folder: Path, repo_id: str, is_asked_to_stop: Callable[[], bool] = lambda: False) -> str:
    """Upload a finished adapter; any failure becomes a sentence with the command to do it later.

    Args:
        is_asked_to_stop: polled during the upload, which is then ended.

    Returns: a message for the user.
    """
    try:
        url, problem = _upload(folder, repo_id, is_asked_to_stop)
    except Exception as error:
        url, problem = None, f"{type(error).__name__}: {error}"
    if url is not None:
        return f"uploaded {folder} to {url}"
    command = shlex.join(["hf", "upload", repo_id, str(folder)])
    reason = " ".join(problem.split()).rstrip(".")[:400]
    return f"warning: {folder} is complete but was not uploaded: {reason}. To do it later: {command}"


def _upload(folder: Path, repo_id: str, is_asked_to_stop: Callable[[], bool]) -> tuple[str | None, str]:
    """(its address, "") or (None, the reason why it failed)."""
    if not has_token():
        return None, f"there is no hub token ({LOGIN})"
    command = [sys.executable, "-m", __name__, str(folder), repo_id]
    environ = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    deadline = time.monotonic() + UPLOAD_SECONDS
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                stopped = is_asked_to_stop()
                if stopped or time.monotonic() > deadline:
                    process.kill()
                    return None, "it was asked to stop" if stopped else f"it took over {UPLOAD_SECONDS / 60:g} minutes"
    last = (output.strip().splitlines() or [f"its process ended with {process.returncode}"])[-1]
    try:
        answer = json.loads(last)
    except ValueError:
        return None, last
    return answer.get("url"), answer.get("error", "")


def main(folder: str, repo_id: str) -> None:
    """In the separate process: create the repository if it does not exist, upload, and print the outcome as JSON."""
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="LoRA trained with sora_llm")
        outcome = {"url": f"{api.endpoint}/{repo_id}"}
    except HfHubHTTPError as error:
        answer = f"{error.response.status_code} {error.response.reason_phrase}"
        outcome = {"error": f"{api.endpoint} answered {answer}" + (f" ({m})" if (m := error.server_message) else "")}
    except Exception as error:
        outcome = {"error": f"{api.endpoint}: {str(error) or type(error).__name__}"}
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
