"""llama.cpp's adapter file, verified: written, read back by gguf's own reader, compared with the factors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sora_llm.artifacts.card import (
    Provenance,
    certificate_of,
    model_card,
    publish_export,
    refuse_other_contents,
    self_check_failed,
    worst_delta_error,
)
from sora_llm.artifacts.consumers import LLAMA_CPP, verdicts_for_gguf
from sora_llm.artifacts.gguf_lora import architecture_of, compare, factors_in, read_gguf, write_gguf
from sora_llm.errors import RunFailed, UserError
from sora_llm.factors import PlainFactors, shapes_of
from sora_llm.files import file_sha256, staging
from sora_llm.run_files import CHAT_TEMPLATE

FILE = "adapter.gguf"


def export_gguf(
    factors: PlainFactors, config: Any, folder: Path, *, outtype: str = "f32", provenance: Provenance
) -> dict[str, Any]:
    """Write plain factors of scale 1 as `folder`/adapter.gguf; the base's weights are not needed.

    `config` is the base's transformers config.  Pruned modules are left out; the others keep their own ranks.  If
    provenance has a chat template, it is saved next to the file: the one in the base's file may differ.  The folder
    appears complete or not at all; an older one of the same name is replaced.

    Returns: the certificate.
    Raises:
        UserError: an architecture or a module unknown to llama.cpp, an adapter without ranks, or a folder that holds
            anything other than an export.
        RunFailed: the file read back differs from what was written, or the disk is full; nothing is left.
    """
    refuse_other_contents(folder)
    architecture = architecture_of(config)
    architecture.check_modules(factors)
    if not any(A.shape[0] for A, _ in factors.values()):
        raise UserError(
            "no rank of the adapter is left (pruned, or never trained), so there is nothing for llama.cpp to apply"
        )
    shapes = shapes_of(factors)
    with staging(folder) as temporary:
        try:
            temporary.mkdir(parents=True)
            write_gguf(temporary / FILE, factors, architecture, outtype, f"LoRA for {provenance.base_model}")
            if provenance.chat_template is not None:
                (temporary / CHAT_TEMPLATE).write_text(provenance.chat_template, encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"the adapter could not be written to {folder.parent}: {error}") from error
        file = read_gguf(temporary / FILE)
        errors, problems = compare(factors, factors_in(file, architecture, factors), outtype)
        verdicts = verdicts_for_gguf(
            file,
            architecture,
            shapes,
            provenance.base_model or "BASE",
            is_base_quantised=provenance.is_base_quantised,
        )
        if not verdicts[LLAMA_CPP].works:
            problems.append(f"llama.cpp would not apply it: {verdicts[LLAMA_CPP].reason}")
        if problems:
            lossless = "" if outtype == "f32" else "; f32 loses nothing"
            raise self_check_failed(problems, hint=lossless)
        ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
        certificate = certificate_of(
            provenance,
            "gguf",
            ranks,
            errors,
            file_sha256(temporary / FILE),
            form={"outtype": outtype, "architecture": architecture.name},
            checks={"gguf_version": version("gguf")},
            verdicts=verdicts,
        )
        return publish_export(temporary, folder, certificate, _card(ranks, shapes, certificate, verdicts, provenance))


def _card(
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    certificate: Mapping[str, Any],
    verdicts: Mapping[str, Any],
    provenance: Provenance,
) -> str:
    worst = worst_delta_error(certificate)
    return model_card(
        f"`{FILE}` for llama.cpp (architecture {certificate['architecture']}, {certificate['outtype']}, a rank per "
        "module, scale folded into the factors)",
        ranks,
        shapes,
        f"read back by gguf {certificate['gguf_version']}, every module has its ΔW (largest relative difference "
        f"{worst:.1e}).",
        verdicts,
        provenance,
        template_use=f"serve it with the same: llama-server … --jinja --chat-template-file {CHAT_TEMPLATE}",
    )
