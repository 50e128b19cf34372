"""What the --out of `consensus` and `export` would replace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sora_llm.artifacts.card import refuse_other_contents
from sora_llm.errors import UserError
from sora_llm.files import nearest_existing
from sora_llm.running.run_folders import run_of_adapter


def check_output_folder(out: Path, sources: Sequence[Path]) -> None:
    """UserError if a result would replace a source (an adapter, a base), the adapter of a run, or anything but an
    earlier export, or if nothing can be written there."""
    if out.resolve() in [folder.resolve() for folder in sources]:
        raise UserError(f"--out {out} is one of the inputs; name another folder")
    if any(run_of_adapter(folder) is not None for folder in (out, out.resolve())):  # it, or what a link leads to
        raise UserError(f"--out {out} is a run's adapter and would be overwritten; name another folder")
    if not (existing := nearest_existing(out)).is_dir():
        raise UserError(f"--out {out}: {existing} is a file, not a folder; name another one")
    try:
        refuse_other_contents(out)
    except UserError as error:
        raise UserError(f"--out {error}") from None
    place = nearest_existing(out.resolve().parent)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: you may not write in {place}; change its permissions, or name another folder")
