"""The model card and certificate of every export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_llm.artifacts.certificate import Certificate
from sora_llm.artifacts.consumers import Verdict
from sora_llm.errors import RunFailed, UserError
from sora_llm.factors import mean_rank, slot_params
from sora_llm.files import publish
from sora_llm.hub import card_metadata
from sora_llm.run_files import CERTIFICATE, CHAT_TEMPLATE

CARD = "README.md"
TRAINED = "Trained with SoRA (a gate per rank, pruned by proximal gradient)"
_EXACT = "exact"
"""What a certificate says of an engine that applies the adapter exactly; of others it says why they do not."""
_LOOKS = 5
"""At a folder that other processes may be replacing, before what is seen there is believed."""


def story_of_run(line: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The story of a run's adapter, and its notes for the certificate, from its line of metrics."""
    step = line.get("best_step")
    if step is None:
        return TRAINED, {}
    return f"{TRAINED}, taken after step {step}, at the lowest dev loss since it was cut,", {"best_step": step}


@dataclass(frozen=True)
class Provenance:
    """The origin of an adapter, as stated in its model card and certificate."""

    base_model: str = ""
    revision: str | None = None
    """Of the base; None for the default branch, and for a local folder."""
    data: Sequence[Mapping[str, Any]] = ()
    """Its training data, including that of the adapter it started from: path, type and, if given, split and separator
    of each data set."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokenizer_files: Sequence[Path] = ()
    chat_template: str | None = None
    separator: str | None = None
    """The separator between prompt and completion in the rows; None if they were conversations, or it is unknown."""
    load_options: str = ""
    """How the base was loaded: the other arguments of from_pretrained, as Python text, then anything else in words."""
    base_loading: Mapping[str, Any] | None = None
    """The same for the certificate, under the names of our config."""
    base_digest: str | None = None
    """`base_files.base_digest` of the base's weights, for the certificate."""
    story: str = TRAINED
    """How it was made: the beginning of a sentence."""
    is_base_quantised: bool = False
    """Whether the base's own files are quantised: llama.cpp converts only unquantised ones."""
    beside: str = "trained and evaluated"
    """What was done on the base as loaded with `load_options`."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the certificate other than the self-check, as JSON."""
    details: str = ""
    """A section of the model card, in Markdown."""
    recipe: str = ""
    """The part of the training config that determines the result, as YAML."""

    def in_certificate(self) -> dict[str, Any]:
        """Entries of the certificate other than the self-check."""
        names = ("separator", "base_loading", "base_digest")
        said = {name: getattr(self, name) for name in names} | {"data": list(self.data) or None}
        return {**self.notes, **{name: value for name, value in said.items() if value is not None}}


def refuse_other_contents(folder: Path, *, may_have_additions: bool = False) -> None:
    """UserError unless an export may replace `folder`: it is missing, empty, or an earlier export with nothing else in
    it, and does not contain the working directory.

    With `may_have_additions`, files added to an export are allowed: a finished run replaces nothing.
    """
    if not may_have_additions and Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} contains the working directory, and an export replaces its folder: name another one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise UserError(
            f"{folder} exists and is not an export (it has no valid {CERTIFICATE}); it would be replaced: name another "
            "folder"
        )
    if folder.is_dir() and (inner := next(folder.glob(f"*/**/{CERTIFICATE}"), None)) is not None:
        raise UserError(f"{folder} would be replaced, and with it the export in {inner.parent}; name another folder")
    if folder.is_dir() and not may_have_additions and (written := _certificate(folder).files) is not None:
        for path in sorted(folder.iterdir()):
            if path.name not in written:
                raise UserError(
                    f"{folder} would be replaced along with {path.name}, which is not part of the export; move it, or "
                    "name another folder"
                )


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of any layout, judging by its certificate: a LoRA alone may come from anywhere."""
    return _certificate(folder).is_of_export


def _certificate(folder: Path) -> Certificate:
    """A folder's certificate; empty also if it is damaged: then nothing says that this is an export."""
    try:
        return Certificate.read(folder)
    except UserError:
        return Certificate()


def certificate_of(
    provenance: Provenance,
    layout: str,
    ranks: Mapping[str, int],
    delta_errors: Mapping[str, float],
    sha256: str | Mapping[str, str],
    *,
    form: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any],
    verdicts: Mapping[str, Verdict] | None = None,
) -> dict[str, Any]:
    """The certificate of an export whose self-check has passed.

    `ranks` and `delta_errors` are by module, `sha256` is of its weights (by file if there are several), `form` says
    what else there is to know about its files, `checks` what the self-check found and with what; `verdicts` by engine.
    """
    certificate = {
        **provenance.in_certificate(),
        "passed": True,
        "layout": layout,
        **(form or {}),
        "modules": {name: {"rank": rank, "delta_error": delta_errors[name]} for name, rank in ranks.items()},
        **checks,
        "sha256": sha256,
    }
    if verdicts is not None:
        certificate["consumers"] = {engine: verdict.reason or _EXACT for engine, verdict in verdicts.items()}
    return certificate


def reasons_in(certificate: Mapping[str, Any]) -> dict[str, str]:
    """{engine: why it does not apply the adapter exactly, "" if it does}."""
    return {engine: "" if said == _EXACT else said for engine, said in certificate["consumers"].items()}


def self_check_failed(
    problems: Sequence[str], *, what: str = "the exported adapter is not the trained one", hint: str = ""
) -> RunFailed:
    """The error that says `what` an export is not, by the first of the `problems` that its self-check found."""
    return RunFailed(f"{what}: {'; '.join(problems[:3])}; nothing was exported{hint}")


def worst_delta_error(certificate: Mapping[str, Any]) -> float:
    """The largest delta_error of all modules."""
    errors: list[float] = [module["delta_error"] for module in certificate["modules"].values()]
    return max(errors)


def publish_export(temporary: Path, folder: Path, certificate: Mapping[str, Any], card: str) -> dict[str, Any]:
    """Add certificate and model card to the files in `temporary`, and move it all to `folder`.

    Returns: the certificate, which also names the files.
    Raises:
        RunFailed: the disk is full or read-only, or files that are not part of an export have since come into `folder`;
            nothing is left.
    """
    try:
        (temporary / CARD).write_text(card, encoding="utf-8")
        files = sorted({CERTIFICATE, *(path.name for path in temporary.iterdir())})
        whole = {**certificate, "files": files}
        (temporary / CERTIFICATE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        _refuse_additions(folder)
        publish(temporary, folder)
    except UserError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"{error} (seen when the export was to be put there; nothing was exported)") from None
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"the adapter could not be written to {folder.parent}: {error}") from error
    return whole


def _refuse_additions(folder: Path) -> None:
    """`refuse_other_contents` for a folder that other processes may be replacing by the same export: read in between,
    one and the other together look like something else."""
    for attempt in range(_LOOKS):
        try:
            return refuse_other_contents(folder)
        except (UserError, FileNotFoundError):
            if attempt + 1 == _LOOKS:
                raise


def model_card(
    form: str,
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    checked: str,
    verdicts: Mapping[str, Verdict],
    provenance: Provenance,
    *,
    in_python: bool = False,
    template_use: str = "use the same (the tokenizer here does)",
) -> str:
    """README.md of an adapter or a merged model: what it is, its ranks, where it works and how to load it there.

    `form` describes the exported form, `checked` the result of its self-check; `verdicts` by engine ({} for a whole
    model); `in_python` shows how PEFT loads it; `template_use` says how to render prompts with the chat template saved
    with it, if provenance has one.
    """
    base = provenance.base_model or "the base model"
    metrics = "".join(f"* {name}: {value:.4f}\n" for name, value in provenance.metrics.items())
    names = (one["path"] + (f", split {one['split']}" if "split" in one else "") for one in provenance.data)
    data = "".join(f"* {name}\n" for name in names)
    table = "\n".join(f"| {name} | {rank} |" for name, rank in ranks.items())
    library = "peft" if in_python else "gguf" if verdicts else "transformers"
    return f"""---
{card_metadata(provenance.base_model, library)}
---
# {"LoRA adapter for" if verdicts else "LoRA merged into"} {base}

{provenance.story} and exported as {"a plain LoRA" if verdicts else "a whole model"}: {form}.
Mean rank {mean_rank(ranks, shapes):.2f} over {len(ranks)} modules (weighted by their size), \
{slot_params(ranks, shapes):,} parameters in them.

{metrics}
{_prompt_line(provenance, template_use)}
Self-check: {checked}

{_python(base, provenance) if in_python else ""}{_where_it_works(verdicts)}{_section("Data", data)}\
{_section("Training", _code(provenance.recipe))}{provenance.details}
## Ranks
| module | rank |
|---|---|
{table}
"""


def _python(base: str, provenance: Provenance) -> str:
    beside = ""
    revision = f", revision={json.dumps(provenance.revision)}" if provenance.revision else ""
    if provenance.load_options:
        wanted = "`import torch`"
        if "BitsAndBytesConfig" in provenance.load_options:
            wanted += ", `from transformers import BitsAndBytesConfig`"
        beside = (
            f"The adapter was {provenance.beside} on the base loaded with ({wanted})\n\n"
            f"    {provenance.load_options}\n\n"
        )
    return f"""## Load it
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)}{revision})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
{beside}"""


def _where_it_works(verdicts: Mapping[str, Verdict]) -> str:
    """A table of engines, by their rules of scale and shape, and a block with the commands to serve it in each."""
    if not verdicts:
        return ""
    rows = "".join(f"| {engine} | {verdict.reason or 'yes'} |\n" for engine, verdict in verdicts.items())
    lines = dict.fromkeys(
        f"# {engine}\n{verdict.serve}\n" for engine, verdict in verdicts.items() if verdict.works and verdict.serve
    )
    return f"""## Where it works
By the rules that each engine has for scale and shapes, computed from these files, not by running it.

| engine | applies it exactly |
|---|---|
{rows}
```
{"".join(lines)}```

"""


def _prompt_line(provenance: Provenance, use: str) -> str:
    lines = ""
    if separator := provenance.separator:
        how = "with it"
        if (end := separator.removesuffix(" ")) != separator:  # most tokenizers join a blank with the word after it
            how = f"{f'with {end!r}' if end else 'without it'}, as the last blank begins the answer's first word"
        lines += f"Every prompt ended with {separator!r} (a Python string): end yours {how}.\n"
    if provenance.chat_template is not None:
        lines += f"Prompts were rendered with the template in {CHAT_TEMPLATE}; {use}.\n"
    return lines


def _code(yaml: str) -> str:
    return f"```yaml\n{yaml}```" if yaml else ""


def _section(title: str, body: str) -> str:
    return f"## {title}\n{body}\n" if body else ""
