"""`sora-llm export RUN`: the adapter of a finished run, or of a stage of its sparsity path, once more and verified."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_llm.backbone import load_backbone
from sora_llm.commands.common import ALONE, exit_code
from sora_llm.config import Config, load_config
from sora_llm.consensus import empty_factors
from sora_llm.distributed import make_accelerator
from sora_llm.errors import UserError
from sora_llm.export import LAYOUTS, Provenance, export_adapter
from sora_llm.inject import adapters, cut_adapters, inject_sora
from sora_llm.inputs import check_backbone, target_modules
from sora_llm.lora_files import CERTIFICATE, CONFIG, WEIGHTS, read_lora
from sora_llm.plan import stage_name
from sora_llm.report import read_json_lines

OWN_FILES = (CONFIG, WEIGHTS, CERTIFICATE, "README.md", "chat_template.jinja")


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm export") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write the adapter of a run in another layout, or of one stage of its sparsity path; the base is "
        "loaded, and the files are checked against the trained adapter as they are after training.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", type=float, metavar="λ", help="the stage of a path, by its λ")
    which.add_argument("--max-params", type=int, metavar="N", help="the stage of the best dev loss within N parameters")
    parser.add_argument("--layout", choices=LAYOUTS, default="padded")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the adapter's new folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    def command() -> dict[str, Any]:
        config_file = arguments.run / "config.yaml"
        if not config_file.is_file():
            raise UserError(f"{arguments.run} is not a run directory: it holds no config.yaml")
        source, line = chosen(arguments.run, arguments.stage, arguments.max_params)
        if arguments.out.resolve() == source.resolve():
            raise UserError(f"--out is {source} itself; name another folder")
        return export_again(load_config(config_file), source, line, arguments.layout, arguments.out)

    def text(result: dict[str, Any]) -> str:
        of = f", stage {result['stage']}" if "stage" in result else ""
        return f"{result['adapter']}: {result['layout']}, {result['kept_params']:,} parameters{of}; self-check passed"

    return exit_code(command, arguments.json, text)


def chosen(run: Path, stage: float | None, max_params: int | None) -> tuple[Path, dict[str, Any]]:
    """The folder of the adapter that is meant, and the line of metrics that tells of it.

    Raises:
        UserError: there is none.
    """
    exports = [line for line in read_json_lines(run / "metrics.jsonl") if line["phase"] == "export"]
    stages = {stage_name(line["sparse_lambda"]): line for line in exports if "stage" in line}
    if stage is None and max_params is None:
        folder = run / "adapter"
        if not exports or not folder.is_dir():
            raise UserError(f"{run} has no adapter yet; start its command again to let it finish")
        return folder, exports[-1]
    if not stages:
        raise UserError(f"{run} is no sparsity path, or none of its stages is done; leave --stage and --max-params out")
    if stage is not None:
        name = stage_name(stage)
        if name not in stages:
            raise UserError(f"{run} has no stage {name}; it has {', '.join(stages)}")
        return run / "path" / name, stages[name]
    assert max_params is not None
    within = {name: line for name, line in stages.items() if line["kept_params"] <= max_params}
    if not within:
        smallest = min(line["kept_params"] for line in stages.values())
        raise UserError(f"no stage of {run} has {max_params:,} parameters or fewer; the smallest has {smallest:,}")
    if any("eval_loss" not in line for line in within.values()):
        raise UserError(f"the stages of {run} have no dev loss to be chosen by; name one with --stage")
    best = min(within, key=lambda name: within[name]["eval_loss"])
    return run / "path" / best, within[best]


def export_again(config: Config, source: Path, line: Mapping[str, Any], layout: str, out: Path) -> dict[str, Any]:
    """Put the adapter in `source` on its base and export it to `out`, with the self-check."""
    spec, _ = check_backbone(config, "none")
    factors = {name: (A, B) for name, (A, B, _) in read_lora(source).factors.items()}  # an export's scale is 1
    model = load_backbone(spec, make_accelerator("none", ALONE).device)
    inject_sora(model, r=1, lora_alpha=1, target_modules=target_modules(config))  # of scale 1, as exported factors are
    cut = {
        name: factors.get(name) or empty_factors(layer.in_features, layer.out_features)
        for name, layer in adapters(model).items()
    }
    cut_adapters(model, cut)
    template = source / "chat_template.jinja"
    provenance = Provenance(
        base_model=config.model.name_or_path,
        data=[dataset.path for dataset in config.data.datasets],
        metrics={"dev loss": line["eval_loss"]} if "eval_loss" in line else {},
        tokenizer_files=[path for path in sorted(source.iterdir()) if path.name not in OWN_FILES],
        chat_template=template.read_text() if template.is_file() else None,
        load_options=spec.load_call,
    )
    certificate = export_adapter(model, out, layout, allow_empty=True, provenance=provenance)
    stage = {"stage": stage_name(line["sparse_lambda"])} if "stage" in line else {}
    return {
        "adapter": str(out),
        "layout": layout,
        **stage,
        "kept_params": line["kept_params"],
        "mean_rank": line["mean_rank"],
        "certificate": certificate,
    }
