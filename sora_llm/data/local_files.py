"""The local files that make up a data set: one, those of a folder, or those that match a pattern."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from sora_llm.data.readers import READERS, kind_of
from sora_llm.errors import UserError
from sora_llm.files import user_path

SAVED, SPLITS = {"state.json", "dataset_info.json"}, "dataset_dict.json"
"""The files that `save_to_disk` of datasets writes next to the rows, and next to the folders of several splits."""
ABOUT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json"}
"""Files that accompany the rows of a hub data set."""
_OTHER_ROWS = re.compile(r"(?i).*\.(ndjson|tsv|orc|avro|(jsonl?|csv|txt|parquet|arrow)\.(zst|xz|bz2|lz4|zip))")
"""Names of files that hold rows in a form that is not read."""
SPLIT_NAMES = (
    {"train", "training"},
    {"validation", "valid", "dev", "val"},
    {"test", "testing", "eval", "evaluation"},
)
"""Words in the names of files and folders by which `datasets` tells one split from another."""


def is_local(path: str) -> bool:
    """Whether `path` is local rather than on the hub, even if nothing exists there: a misspelt file name should be
    reported as missing, not looked up on the network.  A hub id is "name" or "owner/name"."""
    if path.startswith((".", "~", "/")) or _is_glob(path) or kind_of(Path(path)) or path.count("/") > 1:
        return True
    return Path(path).exists() or ("/" in path and Path(path).parent.is_dir())


def check_file(file: Path) -> None:
    """UserError if a file does not exist, is empty or cannot be read."""
    if file.is_symlink() and not file.exists():
        raise UserError(f"data set {file} is a link to {file.readlink()}, which does not exist")
    if not file.is_file():
        raise UserError(f"data set {file} does not exist" if not file.exists() else f"data set {file} is not a file")
    if not os.access(file, os.R_OK):
        raise UserError(f"data set {file} cannot be read: permission denied")
    if file.stat().st_size == 0:
        raise UserError(f"data set {file} is empty")


def _is_glob(path: str) -> bool:
    return not Path(path).exists() and glob.has_magic(path)


def local_files(name: str, type_: str) -> list[Path]:
    """The files behind the path of a data set, sorted; all are of a readable kind, and none is listed twice, even if a
    folder has a link to another of its files.

    Raises:
        UserError: there are none, a folder holds several data sets (splits), or a file is both packed and unpacked.
    """
    path = user_path(name, "the path of a data set")
    if _is_glob(name):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
        files = sorted(Path(name) for name in found if not Path(name).is_dir())
        if not files:
            raise UserError(f"data set {name}: no file matches this pattern")
    elif path.is_dir():
        files = _folder_files(path, type_)
    else:
        files = [path]
    once: dict[Path, Path] = {}
    for file in files:
        _check_kind(file, type_)
        once.setdefault(file.resolve(), file)
    _refuse_packed_copies(name, once.values())
    return list(once.values())


def _refuse_packed_copies(name: str, files: Collection[Path]) -> None:
    """UserError if one of the files is next to its .gz."""
    names = {str(file) for file in files}
    for file in sorted(names):
        if f"{file}.gz" in names:
            raise UserError(
                f"data set {name} has both {file} and {file}.gz, which hold the same rows: name one of them, or move "
                "the other away"
            )


def _folder_files(folder: Path, type_: str) -> list[Path]:
    """The data files anywhere below a folder, except hidden ones.  Text files count only if text is expected: the
    README next to conversations is not data.  Of the files that `save_to_disk` of datasets left, only the rows count,
    not what `map` and others cached next to them."""

    def refuse(error: OSError) -> None:
        raise error  # else the files in a folder that may not be listed would silently be left out

    files, seen = [], set[str]()  # a link may lead back
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # of two links, always the same
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if SPLITS in names:
            raise UserError(f"data set {place} has splits: name the folder of one ({', '.join(sorted(folders))})")
        if SAVED.issubset(names):
            names = _saved_files(Path(place, "state.json"))
        files += [Path(place, name) for name in names if not name.startswith(".") and name not in ABOUT_DATA]
    _refuse_unreadable_rows(folder, sorted(files))
    files = [
        file
        for file in sorted(files)
        if kind_of(file) is not None and (type_ == "completion" or kind_of(file) != ".txt")
    ]
    if not files:
        raise UserError(f"data set {folder}: the folder holds no {_kinds_in_words()} file")
    _refuse_splits(folder, files)
    return files


def _refuse_unreadable_rows(folder: Path, files: Sequence[Path]) -> None:
    """UserError if a folder holds rows in a form that cannot be read: left out, nobody would miss them."""
    if (other := next((file for file in files if _OTHER_ROWS.fullmatch(file.name)), None)) is not None:
        raise UserError(
            f"data set {folder} holds {other.relative_to(folder)}, whose rows cannot be read: convert it to "
            f"{_kinds_in_words()}, or name the other files by a pattern"
        )


def _refuse_splits(folder: Path, files: Sequence[Path]) -> None:
    """UserError if some of a folder's files are named as training data and some as evaluation data."""
    names = [str(file.relative_to(folder)) for file in files]
    found: dict[int, str] = {}  # the first file of each split
    for name in names:
        words = set(re.split("[^a-z]+", name.lower()))
        splits = [number for number, own in enumerate(SPLIT_NAMES) if own & words]
        if len(splits) == 1:
            found.setdefault(splits[0], name)
    if len(found) > 1:
        examples = [found[number] for number in sorted(found)]
        raise UserError(
            f"data set {folder} has files of several splits ({', '.join(examples)}); name those to train on by file, "
            f"folder or pattern (such as {folder / examples[0]}), and those to measure on in data.val_datasets"
        )


def _saved_files(state: Path) -> list[str]:
    """The names of the files that make up a data set written by `save_to_disk`."""
    try:
        return [str(file["filename"]) for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"data set {state.parent}: {state.name} does not say which files the data set is made of"
        ) from None


def _check_kind(file: Path, type_: str) -> None:
    if kind_of(file) is None:
        if not file.exists():
            raise UserError(f"data set {file} does not exist")
        raise UserError(f"data set {file} is of an unknown kind; known are {_kinds_in_words()}")
    if kind_of(file) == ".txt" and type_ != "completion":
        raise UserError(f"data set {file}: a .txt file holds plain text, which only type completion can read")


def _kinds_in_words() -> str:
    return ", ".join(READERS) + " (.gz of all but parquet and arrow)"
