"""The files of a base, in its folder or in the hub's cache: tokenizer, weights, and a digest of the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sora_llm.base_spec import BackboneSpec
from sora_llm.errors import UserError
from sora_llm.weights_digest import weights_digest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be loaded from a local folder: its vocabulary is there, not only a template."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def tokenizer_files_in(folder: Path) -> list[Path]:
    """The files of the tokenizer in a local folder."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def tokenizer_files(spec: BackboneSpec) -> list[Path]:
    """The files of the base's tokenizer, as they are (`save_pretrained` would not write tokenizer.model)."""
    return base_files(spec, TOKENIZER_FILES)


def base_files(spec: BackboneSpec, names: Sequence[str]) -> list[Path]:
    """The base's files with these names, in its folder or in the hub's cache."""
    if spec.folder.is_dir():
        return [spec.folder / name for name in names if (spec.folder / name).is_file()]
    from transformers.utils import cached_file

    found = (
        cached_file(
            spec.name_or_path,
            name,
            revision=spec.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in names
    )
    return [Path(path) for path in found if path is not None]


def weight_files(spec: BackboneSpec) -> list[Path]:
    """The base's weights in safetensors, one file or its shards.

    Raises:
        UserError: there are none, or some are missing.
    """
    if single := base_files(spec, [SINGLE]):  # transformers loads it even if an index of an earlier form is left
        return single
    index = base_files(spec, [INDEX])
    if not index:
        raise UserError(
            f"{spec.name_or_path} has no weights in safetensors ({SINGLE}); pickles (*.bin) are not read: load and "
            "save it with transformers, and name that folder"
        )
    try:
        names = sorted(set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index[0]} is damaged: {error}") from None
    shards = base_files(spec, names)
    if len(shards) < len(names):
        missing = next(name for name in names if name not in [path.name for path in shards])
        raise UserError(f"{spec.name_or_path} lacks {missing}, which its {INDEX} names")
    return shards


def base_digest(spec: BackboneSpec) -> str | None:
    """A digest that identifies the base's weights; None if they are not safetensors.  They are read in small parts; hub
    files that are not in its cache are fetched.

    Raises:
        UserError: some of them are missing, or cannot be read.
    """
    if not base_files(spec, [SINGLE, INDEX]):
        return None
    try:
        return weights_digest(weight_files(spec))
    except (OSError, ValueError) as error:
        raise UserError(f"the weights of {spec.name_or_path} cannot be read: {error}") from None
