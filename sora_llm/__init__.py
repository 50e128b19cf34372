"""SoRA (sparse low-rank adaptation) of large language models: train with a gate per rank, cut, export a plain LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SoraLinear": "sora",
    "inject_sora": "inject",
    "ProxAdamW": "optim",
    "RankScheduler": "rank_scheduler",
    "parameter_groups": "optim",
    "consensus_prune": "pipeline",
    "export_adapter": "export",
    "UserError": "errors",
    "RunFailed": "errors",
}
__all__ = [
    "ProxAdamW",
    "RankScheduler",
    "RunFailed",
    "SoraLinear",
    "UserError",
    "consensus_prune",
    "export_adapter",
    "inject_sora",
    "parameter_groups",
]

if TYPE_CHECKING:
    from sora_llm.errors import RunFailed, UserError
    from sora_llm.export import export_adapter
    from sora_llm.inject import inject_sora
    from sora_llm.optim import ProxAdamW, parameter_groups
    from sora_llm.pipeline import consensus_prune
    from sora_llm.rank_scheduler import RankScheduler
    from sora_llm.sora import SoraLinear


def __dir__() -> list[str]:
    """The public names, for completion and `dir`."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `sora-llm --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
