"""`sora-llm export SOURCE`: an adapter for another engine, smaller, or merged into its base; always verified."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_llm import run_files
from sora_llm.arguments import Parser
from sora_llm.artifacts.card import Provenance, reasons_in, story_of_run
from sora_llm.artifacts.gguf_export import export_gguf
from sora_llm.artifacts.gguf_lora import OUTTYPES
from sora_llm.artifacts.merged import plan_merge
from sora_llm.artifacts.merged_export import export_merged, rounding_in_words
from sora_llm.backbone import from_pretrained_args, load_backbone, load_model_config, quiet_libraries, skeleton
from sora_llm.base_files import tokenizer_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.common import options_for_keys, run_command
from sora_llm.commands.eval_data import dev_rows, eval_config
from sora_llm.commands.output_folder import check_output_folder
from sora_llm.commands.path_arguments import resolve_path, trained_config
from sora_llm.commands.sizes import Size, add_size_arguments, refuse_empty_result, size_in
from sora_llm.commands.sources import (
    SavedAdapter,
    base_of,
    own_tokenizer,
    plain_factors,
    refuse_other_weights,
    shapes_in,
    source_of,
)
from sora_llm.config import Config, recipe
from sora_llm.consensus import CutReport, cut_svd
from sora_llm.distributed.group import local_device
from sora_llm.errors import UserError
from sora_llm.export import LAYOUTS, export_adapter
from sora_llm.factors import PlainFactors, kept_params, mean_rank, shapes_of
from sora_llm.files import user_path
from sora_llm.inject import attach_factors
from sora_llm.prompt_format import recorded_separator
from sora_llm.quantised import is_quantised
from sora_llm.report import read_json_lines
from sora_llm.run_files import stage_name
from sora_llm.running.evaluation import evaluate
from sora_llm.running.inputs import check_inputs
from sora_llm.topology import ALONE

BASES = ("dequantized", "original")


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="Write an adapter again: in another layout, of another size, of one stage of a sparsity path, or "
        "merged into its base.  SOURCE is a run directory, a checkpoint or any PEFT LoRA folder.  What is written is "
        "read back from disk and checked.",
    )
    parser.add_argument("source", metavar="SOURCE", help="run directory, checkpoint or LoRA folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the new folder")
    parser.add_argument(
        "--layout",
        choices=(*LAYOUTS, "gguf", "merged"),
        default="padded",
        help="padded: a PEFT folder with one rank; ragged: with a rank per module; gguf: llama.cpp's adapter file; "
        "merged: the whole model (default padded)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", type=float, metavar="λ", help="the stage of a path, by its λ")
    which.add_argument("--max-params", type=int, metavar="N", help="the stage of the best dev loss within N parameters")
    add_size_arguments(parser)
    parser.add_argument("--outtype", choices=tuple(OUTTYPES), help="numbers of layout gguf (default f32)")
    parser.add_argument(
        "--base",
        choices=BASES,
        help="what layout merged adds to: the weights as 4-bit layers hold them, which the adapter was trained on "
        "(default of a 4-bit run), or as they are in the base's files",
    )
    parser.add_argument("--skip-dev-loss", action="store_true", help="do not measure a merged model on the dev rows")
    parser.add_argument("--base-model", metavar="MODEL", help="the base model, if it has moved")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm export") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_args(argv)
    options = options_for_keys(arguments, base="base_model")
    return run_command(lambda: exported(arguments), arguments.json, as_text, options)


def exported(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the adapter that SOURCE names, and describe the result.

    Raises:
        UserError: an invalid source, size or layout, or a folder that is taken.
        RunFailed: the files read back are not what was to be written; nothing is left behind.
    """
    size = size_in(arguments)
    check_options(arguments)
    source, line = chosen(arguments.source, arguments.stage, arguments.max_params)
    out = user_path(str(arguments.out), "--out").absolute()
    place = Path(arguments.source).expanduser()
    check_output_folder(out, [place, source.folder or place])
    quiet_libraries()
    spec = base_of([source], arguments.base_model, arguments.trust_remote_code, "--base-model")
    check_output_folder(out, [spec.folder])
    dequantise = of_dequantised(spec, arguments.base) if arguments.layout == "merged" else False
    if arguments.layout != "gguf":  # gguf reads no weights of the base
        refuse_other_weights([source], spec, arguments.base_model, "--base-model")
    adapter = prepared(source, spec, size, arguments)
    provenance = provenance_of(source, spec, line, adapter)
    if arguments.layout == "gguf":
        outtype = arguments.outtype or "f32"
        certificate = export_gguf(adapter.factors, adapter.config, out, outtype=outtype, provenance=provenance)
    elif arguments.layout == "merged":
        device = local_device()
        merge = plan_merge(adapter.factors, spec, adapter.base_skeleton, dequantise=dequantise, device=device)
        measure = None
        if not arguments.skip_dev_loss:
            measure = dev_loss_measure(trained_config(resolve_path(arguments.source)), spec, device)
        certificate = export_merged(merge, adapter.config, out, provenance=provenance, dev_loss_of=measure)
    else:
        certificate = export_on_base(adapter.factors, spec, arguments.layout, out, provenance)
    return described(arguments, line, adapter, certificate)


# ----------------------------------------------------------------------------------------------------------- checks


def check_options(arguments: argparse.Namespace) -> None:
    """UserError for options that belong to another layout."""
    if arguments.outtype is not None and arguments.layout != "gguf":
        raise UserError(f"--outtype is for --layout gguf; layout {arguments.layout} has a fixed number format")
    if arguments.base is not None and arguments.layout != "merged":
        raise UserError("--base says what --layout merged adds to; another place of the base model is --base-model")
    if arguments.skip_dev_loss and arguments.layout != "merged":
        raise UserError(f"--skip-dev-loss is for --layout merged; layout {arguments.layout} measures none")


def of_dequantised(spec: BackboneSpec, base: str | None) -> bool:
    """Whether the adapter is added to the values that 4-bit layers hold.

    Raises:
        UserError: 8-bit layers without --base original, or --base dequantized without 4-bit layers.
    """
    if spec.load_in_8bit and base != "original":
        raise UserError(
            "8-bit layers also round activations, so no weights reproduce them; merge with --base original, and check "
            "the dev loss"
        )
    if base == "dequantized" and not spec.load_in_4bit:
        raise UserError(
            "--base dequantized: the adapter is not known to have been trained on 4-bit layers; leave it out"
        )
    return spec.load_in_4bit and base != "original"


# ---------------------------------------------------------------------------------------------------------- sources


def chosen(path: str, stage: float | None, max_params: int | None) -> tuple[SavedAdapter, dict[str, Any]]:
    """The chosen adapter, and its line of metrics ({} if there is none).

    Raises:
        UserError: there is no such adapter.
    """
    place = resolve_path(path)
    exports = [] if place.run_dir is None else _exports(place.run_dir)
    stages = {stage_name(line["sparse_lambda"]): line for line in exports if "stage" in line}
    if stage is None and max_params is None:
        own = stages.get(place.stage) if place.stage is not None else exports[-1] if exports else None
        return source_of(place), own or {}
    if place.run_dir is None or not stages:
        raise UserError(
            f"{path} is not a sparsity path, or none of its stages has finished; leave out --stage and --max-params"
        )
    if stage is not None:
        name = stage_name(stage)
        if name not in stages:
            raise UserError(f"{path} has no stage {name}; it has {', '.join(stages)}")
    else:
        assert max_params is not None
        name = _best_within(path, stages, max_params)
    return source_of(resolve_path(place.run_dir / run_files.PATH / name)), stages[name]


def _best_within(path: str, stages: Mapping[str, Mapping[str, Any]], max_params: int) -> str:
    """The stage with the best dev loss within a number of parameters."""
    within = {name: line for name, line in stages.items() if line["kept_params"] <= max_params}
    if not within:
        smallest = min(line["kept_params"] for line in stages.values())
        raise UserError(f"no stage of {path} has {max_params:,} parameters or fewer; the smallest has {smallest:,}")
    if any("eval_loss" not in line for line in within.values()):
        raise UserError(f"the stages of {path} have no dev loss to choose by; name one with --stage")
    return min(within, key=lambda name: within[name]["eval_loss"])


def _exports(run_dir: Path) -> list[dict[str, Any]]:
    """The lines that a run wrote about its exports; incomplete ones, added by somebody else, are skipped."""
    lines = [line for line in read_json_lines(run_dir / run_files.METRICS) if line.get("phase") == "export"]
    return [line for line in lines if "stage" not in line or {"sparse_lambda", "kept_params"} <= line.keys()]


@dataclass(frozen=True)
class PreparedAdapter:
    """Plain factors of scale 1 for every target, and the base that they are for, without its weights.

    `cut` reports what was dropped, None if the adapter was not recompressed.
    """

    factors: PlainFactors
    config: Any
    base_skeleton: nn.Module
    cut: CutReport | None

    @property
    def ranks(self) -> dict[str, int]:
        return {name: A.shape[0] for name, (A, _) in self.factors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{module: (I, O)}."""
        return shapes_of(self.factors)


def prepared(source: SavedAdapter, spec: BackboneSpec, size: Size, arguments: argparse.Namespace) -> PreparedAdapter:
    """The source's adapter as plain factors, cut to the requested size.

    Raises:
        UserError: it does not fit the base, or the size leaves nothing.
    """
    config = load_model_config(spec)
    base_skeleton = skeleton(config, spec)
    source = source.on(base_skeleton)
    shapes = shapes_in(spec, base_skeleton, [source])
    factors = plain_factors(source, shapes)
    budget, tolerance = size.params(shapes), arguments.tolerance
    if budget is None and tolerance is None:
        return PreparedAdapter(factors, config, base_skeleton, None)
    gateless = {name: (A, B, None) for name, (A, B) in factors.items()}
    factors, report = cut_svd(gateless, 1.0, budget, arguments.min_rank, tolerance)
    refuse_empty_result(report.kept_params, report.energy, shapes)
    return PreparedAdapter(factors, config, base_skeleton, report)


# ----------------------------------------------------------------------------------------------------------- export


def provenance_of(
    source: SavedAdapter, spec: BackboneSpec, line: Mapping[str, Any], adapter: PreparedAdapter
) -> Provenance:
    """The adapter's origin, for its model card and certificate."""
    files, template = own_tokenizer(source, spec)
    own = source.config is not None
    is_whole = adapter.cut is None
    story, notes = story_of_run(line) if own else (f"Taken from the LoRA {source.name}", {})
    return Provenance(
        base_model=spec.name_or_path,
        revision=spec.revision,
        data=source.data,
        metrics={"dev loss": line["eval_loss"]} if "eval_loss" in line and is_whole else {},
        tokenizer_files=files or tokenizer_files(spec),
        chat_template=template,
        separator=recorded_separator(source.config, source.certificate),
        load_options=from_pretrained_args(spec, adapter.config),
        base_loading=spec.loading,
        base_digest=source.base_digest,
        is_base_quantised=is_quantised(adapter.config),
        story=story,
        recipe="" if source.config is None else recipe(source.config),
        beside=Provenance.beside if own else "verified",
        notes={"source": source.name, **notes, **_cut_notes(adapter.cut)},
        details="" if adapter.cut is None else f"## Size\n{_cut_sentence(adapter.cut)}\n",
    )


def _cut_notes(cut: CutReport | None) -> dict[str, Any]:
    return {} if cut is None else {"energy_dropped": cut.dropped_share, "relative_error": cut.relative_error}


def _cut_sentence(cut: CutReport) -> str:
    return (
        f"Cut to its largest singular components: {cut.dropped_share:.2%} of Σ ‖ΔW‖² was dropped (relative error of "
        f"ΔW {cut.relative_error:.3g})."
    )


def export_on_base(
    factors: PlainFactors, spec: BackboneSpec, layout: str, out: Path, provenance: Provenance
) -> dict[str, Any]:
    """Write a PEFT folder, checked on the base with its weights; returns the certificate."""
    model = attach_factors(load_backbone(spec, local_device()), factors)
    return export_adapter(model, out, layout, allow_empty=True, provenance=provenance)


def dev_loss_measure(
    config: Config | None, spec: BackboneSpec, device: torch.device
) -> Callable[[nn.Module], float] | None:
    """A function that measures a model on the dev rows of the run; None if it has none."""
    if config is None or not config.data.has_dev_rows:
        return None
    config = eval_config(config, spec)
    try:
        inputs = check_inputs(config, "none")
        measured = dev_rows(config, inputs)
    except UserError as error:
        raise UserError(
            f"{error} (needed to measure the merged model; --skip-dev-loss skips the measurement)"
        ) from None
    measured.warn_of_leak()
    batch_size, rows = config.evaluation.per_device_eval_batch_size, measured.rows
    return lambda model: evaluate(model, rows, inputs.batch, batch_size=batch_size, world=ALONE, device=device)


# ----------------------------------------------------------------------------------------------------------- result


def described(
    arguments: argparse.Namespace, line: Mapping[str, Any], adapter: PreparedAdapter, certificate: Mapping[str, Any]
) -> dict[str, Any]:
    """The export, as JSON."""
    return {
        "adapter": str(arguments.out),
        "layout": arguments.layout,
        **({"stage": stage_name(line["sparse_lambda"])} if "stage" in line else {}),
        "kept_params": kept_params(adapter.ranks, adapter.shapes),
        "mean_rank": mean_rank(adapter.ranks, adapter.shapes),
        **_cut_notes(adapter.cut),
        "certificate": dict(certificate),
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The result for a terminal: what was exported, and which engines apply it."""
    certificate = result["certificate"]
    of = f", stage {result['stage']}" if "stage" in result else ""
    lines = [
        f"{result['adapter']}: {result['layout']}, {result['kept_params']:,} parameters, mean rank "
        f"{result['mean_rank']:.2f}{of}; self-check passed"
    ]
    if "energy_dropped" in result:
        lines.append(
            f"dropped {result['energy_dropped']:.2%} of Σ ‖ΔW‖² (relative error of ΔW {result['relative_error']:.3g})"
        )
    if result["layout"] == "merged":
        lines.append(
            f"{certificate['base']} base: {rounding_in_words(certificate)}, logits are off by "
            f"{certificate['logits_error']:.1e}"
        )
        lines += [f"dev loss {loss:.4f}  {name}" for name, loss in certificate["dev_loss"].items()]
        return "\n".join(lines)
    reasons = reasons_in(certificate)
    exact = [engine for engine, reason in reasons.items() if not reason]
    lines.append(f"applied exactly by {', '.join(exact)}; how to serve it: {result['adapter']}/README.md")
    lines += [f"not by {engine}: {reason}" for engine, reason in reasons.items() if reason]
    return "\n".join(lines)
