"""The export at the end of a run: one process writes, all verify what was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sora_llm import export
from sora_llm.artifacts.card import Provenance
from sora_llm.distributed.collectives import gather_objects, is_main, on_main
from sora_llm.peft_check import reloaded, worst_of


@dataclass(frozen=True)
class Exported:
    """A published export; `eval_loss` is the reloaded adapter's, None without a dev set."""

    folder: Path
    certificate: dict[str, Any]
    eval_loss: float | None


def export_verified(
    model: nn.Module,
    folder: Path,
    layout: str,
    *,
    provenance: Provenance,
    allow_empty: bool,
    probe_ids: Tensor,
    eval_loss_of: Callable[[nn.Module], float | None],
    before_publishing: Callable[[], None] = lambda: None,
) -> Exported:
    """Export the cut adapter of `model`, which every process holds in full, and verify it from disk (collective).

    The main process writes; every process reloads the files with PEFT, compares, and takes its share of the dev set.

    Raises:
        RunFailed: an empty adapter that is not allowed, or the self-check found a difference.
    """
    temporary = Path(
        on_main(
            lambda: str(export.write_adapter(model, folder, layout, allow_empty=allow_empty, provenance=provenance))
        )
    )
    try:
        with reloaded(model, temporary, probe_ids) as check:
            eval_loss = eval_loss_of(check.peft_model)
        before_publishing()
        # Also waits for the others: the main process is about to rename the folder that they are reading.
        worst = worst_of(gather_objects(check.errors))
        if eval_loss is not None:
            metrics = {**provenance.metrics, "dev loss of this adapter, reloaded": eval_loss}
            provenance = replace(provenance, metrics=metrics)
        certificate = on_main(lambda: export.certify_and_publish(model, temporary, folder, layout, worst, provenance))
    finally:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)  # left by an export that was stopped, or failed
    return Exported(folder, certificate, eval_loss)
