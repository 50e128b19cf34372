"""The certificate.json of an export: what its self-check found, and where the adapter comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_llm.errors import UserError
from sora_llm.files import file_sha256
from sora_llm.row_types import FIELDS
from sora_llm.run_files import ADAPTER_WEIGHTS, CERTIFICATE


@dataclass(frozen=True)
class Certificate:
    """A certificate as it is read back; anybody may have written it.

    A fact that it lacks, or has in another type, is None or empty; so is every fact of a folder without a certificate.
    """

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Certificate:
        """The one in a folder; an empty one if there is none.

        Raises:
            UserError: it cannot be read, or is damaged.
        """
        file = folder / CERTIFICATE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return cls()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); change its permissions, or remove it") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}); restore or remove it") from None
        if not isinstance(content, dict):
            raise UserError(f"{file} is damaged (it is no JSON object); restore or remove it")
        return cls(content)

    def check_describes(self, folder: Path) -> None:
        """UserError if it was written for other weights than those of the LoRA in `folder`, if one is there."""
        sha256, weights = self.content.get("sha256"), folder / ADAPTER_WEIGHTS
        if sha256 is not None and weights.is_file() and sha256 != file_sha256(weights):
            raise UserError(f"{weights} is not what its {CERTIFICATE} was written for; remove one of the two")

    @property
    def is_of_export(self) -> bool:
        """Whether it is that of an export, of any layout."""
        return {"layout", "modules"} <= self.content.keys()

    @property
    def modules(self) -> frozenset[str]:
        """The modules that the adapter was made for, including pruned ones."""
        return frozenset(self._of_type(dict, "modules") or ())

    @property
    def files(self) -> frozenset[str] | None:
        """The names of all files of the export."""
        files = self._of_type(list, "files")
        return None if files is None else frozenset(name for name in files if isinstance(name, str))

    @property
    def base_digest(self) -> str | None:
        """`base_files.base_digest` of the base weights that the adapter was trained on."""
        return self._of_type(str, "base_digest")

    @property
    def base_loading(self) -> dict[str, Any] | None:
        """How those weights were loaded, as `BackboneSpec.loaded_as` takes it."""
        return self._of_type(dict, "base_loading")

    @property
    def separator(self) -> str | None:
        """The separator between prompt and completion in the rows of its training."""
        return self._of_type(str, "separator")

    @property
    def data(self) -> list[dict[str, Any]]:
        """The data sets that it was trained on: path, type and, if given, split, name and separator of each."""
        return [entry for entry in self._of_type(list, "data") or () if _is_dataset(entry)]

    def _of_type(self, kind: type, name: str) -> Any:
        value = self.content.get(name)
        return value if isinstance(value, kind) else None


def _is_dataset(entry: object) -> bool:
    """Whether an entry of a certificate's data can be used, and printed."""
    return (
        isinstance(entry, dict)
        and isinstance(path := entry.get("path"), str)
        and path.isprintable()
        and isinstance(type_ := entry.get("type"), str)
        and type_ in FIELDS
        and all(isinstance(text := entry.get(key) or "", str) and text.isprintable() for key in ("split", "name"))
        and isinstance(entry.get("separator", ""), str)
    )
