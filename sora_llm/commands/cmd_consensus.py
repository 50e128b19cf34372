"""`sora-llm consensus SOURCE SOURCE … --out FOLDER`: merge separately trained adapters, verified on their base."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_llm.arguments import Parser
from sora_llm.artifacts.card import Provenance
from sora_llm.backbone import from_pretrained_args, load_backbone, load_model_config, quiet_libraries, skeleton
from sora_llm.base_files import tokenizer_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.common import options_for_keys, run_command
from sora_llm.commands.output_folder import check_output_folder
from sora_llm.commands.sizes import add_size_arguments, refuse_empty_result, size_in
from sora_llm.commands.sources import (
    SavedAdapter,
    SharedTokenizer,
    base_of,
    of_other_forms,
    read_source,
    refuse_other_targets,
    refuse_other_weights,
    replica,
    shapes_in,
    shared_digest,
    shared_tokenizer,
)
from sora_llm.distributed.group import local_device
from sora_llm.errors import UserError
from sora_llm.export import LAYOUTS, export_adapter
from sora_llm.factors import mean_rank, shapes_of
from sora_llm.files import user_path
from sora_llm.inject import attach_factors
from sora_llm.merge import Merged, merge, merge_errors
from sora_llm.prompt_format import recorded_separator
from sora_llm.quantised import is_quantised
from sora_llm.running.data_lineage import deduplicated


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="Merge adapters of one base: the singular components of the mean of their products.  Sources are "
        "run directories, checkpoints and any PEFT LoRA folders.  Without a size nothing is lost.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="run directory, checkpoint or LoRA folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the merged adapter's new folder")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per source, any scale (default: 1)")
    add_size_arguments(parser)
    parser.add_argument("--layout", choices=LAYOUTS, default="padded")
    parser.add_argument("--base", metavar="MODEL", help="the base model, if it has moved")
    parser.add_argument(
        "--allow-missing", action="store_true", help="a module that only some sources have counts as 0 in the others"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm consensus") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_args(argv)
    return run_command(lambda: consensus_of(arguments), arguments.json, as_text, options_for_keys(arguments))


def consensus_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merge the sources, write the result and describe it.

    Raises:
        UserError: sources that do not belong together, an invalid size, or a folder that is taken.
        RunFailed: the files read back are not what was to be written; nothing is left behind.
    """
    check_weights(arguments)
    size = size_in(arguments)
    folders = [user_path(text, "SOURCE") for text in arguments.sources]
    out = user_path(str(arguments.out), "--out").absolute()
    check_output_folder(out, folders)
    quiet_libraries()
    sources = [read_source(path) for path in arguments.sources]
    spec = base_of(sources, arguments.base, arguments.trust_remote_code)
    check_output_folder(out, [spec.folder])
    base_skeleton = skeleton(load_model_config(spec), spec)
    refuse_other_weights(sources, spec, arguments.base)
    sources = [source.on(base_skeleton) for source in sources]
    refuse_other_targets(sources, arguments.allow_missing)
    shapes = shapes_in(spec, base_skeleton, sources)
    largest = max(arguments.weights or [1.0])
    weights = [weight / largest for weight in arguments.weights or [1.0] * len(sources)]
    replicas = [replica(source, weight, shapes) for source, weight in zip(sources, weights, strict=True)]
    merged = merge(
        replicas,
        size.params(shapes),
        arguments.tolerance,
        arguments.min_rank,
    )
    refuse_empty_result(merged.report.kept_params, merged.report.energy, shapes)
    tokenizer = shared_tokenizer(sources, spec)
    result = described(sources, merged, merge_errors(replicas, merged.factors), weights)
    result |= {"chat_template_of": tokenizer.owner, "other_chat_templates": tokenizer.others}
    result |= {"separators": separators_of(sources)}
    result |= {"base_form": spec.form, "of_other_base_forms": of_other_forms(sources, spec)}
    certificate = export_consensus(sources, merged, spec, tokenizer, arguments.layout, out, result)
    del certificate["merge"]  # already in the result
    return {"adapter": str(arguments.out), "layout": arguments.layout, **result, "certificate": certificate}


# ----------------------------------------------------------------------------------------------------------- checks


def check_weights(arguments: argparse.Namespace) -> None:
    """UserError for invalid --weights, before any file is read."""
    weights, count = arguments.weights, len(arguments.sources)
    if weights is not None and len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} sources; give one for each")
    if weights is not None and not (all(0 <= w < math.inf for w in weights) and any(weights)):
        raise UserError(f"--weights {' '.join(f'{w:g}' for w in weights)}: weights must be 0 or more, and not all 0")


# ----------------------------------------------------------------------------------------------------------- result


def described(
    sources: Sequence[SavedAdapter], merged: Merged, errors: Mapping[str, float], weights: Sequence[float]
) -> dict[str, Any]:
    """The merge as JSON: each source's part, and ranks and error in every module."""
    shapes = shapes_of(merged.factors)
    ranks = [{name: source.ranks.get(name, 0) for name in shapes} for source in sources]
    report, replicas = merged.report, iter(merged.replicas)
    parts = []
    for source, own, weight in zip(sources, ranks, weights, strict=True):
        part: dict[str, Any] = {"source": source.name, "weight": 0.0, "mean_rank": mean_rank(own, shapes)}
        if weight > 0:
            seen = next(replicas)
            part |= {"weight": seen.weight, "cosine": seen.cosine, "distance": seen.distance}
        parts.append(part)
    return {
        "sources": parts,
        "mean_rank": mean_rank(report.ranks, shapes),
        "kept_params": report.kept_params,
        "merge_error": report.relative_error,
        "shortfall": report.shortfall,
        "jaccard": merged.jaccard,
        "num_distinct": merged.num_distinct,
        "modules": {
            name: {"ranks": [own[name] for own in ranks], "rank": report.ranks[name], "merge_error": errors[name]}
            for name in shapes
        },
    }


def separators_of(sources: Sequence[SavedAdapter]) -> dict[str, str | None]:
    """{source: the separator after its prompts}; None for those with conversations, or if it is not known."""
    return {source.name: recorded_separator(source.config, source.certificate) for source in sources}


def shared_separator(result: Mapping[str, Any]) -> str | None:
    """The separator that all sources have; None if they differ, or one has none."""
    found = set(result["separators"].values())
    return found.pop() if len(found) == 1 else None


def export_consensus(
    sources: Sequence[SavedAdapter],
    merged: Merged,
    spec: BackboneSpec,
    tokenizer: SharedTokenizer,
    layout: str,
    out: Path,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the merged factors on the base and export them with the self-check; returns the certificate."""
    config = load_model_config(spec)
    model = attach_factors(load_backbone(spec, local_device()), merged.factors)
    provenance = Provenance(
        base_model=spec.name_or_path,
        revision=spec.revision,
        data=deduplicated([entry for source in sources for entry in source.data]),
        tokenizer_files=tokenizer.files or tokenizer_files(spec),
        chat_template=tokenizer.template,
        separator=shared_separator(result),
        load_options=from_pretrained_args(spec, config),
        base_loading=spec.loading,
        base_digest=shared_digest(sources, spec),
        is_base_quantised=is_quantised(config),
        story=f"Merged from {len(sources)} adapters (singular components of the mean of their products)",
        beside="verified",
        notes={"merge": dict(result)},
        details="## Merge\n"
        + "".join(f"{part}\n\n" for part in (_sources_table(result), *_warnings(result), "Ranks of each source:"))
        + f"{_modules_table(result)}\n\n",
    )
    return export_adapter(model, out, layout, allow_empty=True, provenance=provenance)


def as_text(result: Mapping[str, Any]) -> str:
    """The result for a terminal: a line per source, ranks by projection, and where the adapter is."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for name, module in result["modules"].items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(module)
    count = len(result["sources"])
    lines = [
        f"{index}  {part['source']}: weight {part['weight']:.3f}, mean rank {part['mean_rank']:.2f}"
        + (f", cosine to the mean {part['cosine']:.3f}" if part.get("cosine") is not None else "")
        for index, part in enumerate(result["sources"], start=1)
    ]
    if result["num_distinct"] == 1:
        num_merged = sum(part["weight"] > 0 for part in result["sources"])
        same = "one adapter of positive weight" if num_merged == 1 else "bit for bit the same adapter"
        lines.append(f"({same}: nothing was averaged)")
    lines += [
        "",
        "mean rank of  " + "".join(f"{index:>8}" for index in range(1, count + 1)) + "  merged   largest error",
    ]
    for kind, modules in by_kind.items():
        own = [sum(module["ranks"][k] for module in modules) / len(modules) for k in range(count)]
        kept = sum(module["rank"] for module in modules) / len(modules)
        worst = max(module["merge_error"] for module in modules)
        lines.append(f"{kind:<14}" + "".join(f"{rank:>8.2f}" for rank in own) + f"{kept:>8.2f}   {worst:.2e}")
    short = f", {result['shortfall']:,} below the budget: all that is alive" if result["shortfall"] else ""
    lines += [
        "",
        f"{result['adapter']}: {result['layout']}, mean rank {result['mean_rank']:.2f}, {result['kept_params']:,} "
        f"parameters{short}; {result['merge_error']:.2e} of ΔW cut off; self-check passed",
        *(f"warning: {sentence}" for sentence in _warnings(result)),
    ]
    return "\n".join(lines)


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """Sentences about sources that were trained with different prompt formats, or on different forms of the base."""

    def were(others: Sequence[str]) -> str:
        return f"{', '.join(others)} {'was' if len(others) == 1 else 'were'} trained"

    found = []
    if others := result["other_chat_templates"]:
        found.append(f"the chat template is that of {result['chat_template_of']}; {were(others)} with another one")
    separators = result["separators"]
    plain = [name for name, separator in separators.items() if separator is not None]
    if plain and result["chat_template_of"] is not None:
        found.append(f"the chat template is that of {result['chat_template_of']}; {were(plain)} on plain prompts")
    elif len(set(separators.values())) > 1:
        said = ", ".join(f"{name} {'none known' if own is None else repr(own)}" for name, own in separators.items())
        found.append(f"the separators after prompts differ ({said}), so none is recorded for the result")
    if others := result["of_other_base_forms"]:
        found.append(f"the base is loaded as {result['base_form']}; {were(others)} on another form of it")
    return found


def _sources_table(result: Mapping[str, Any]) -> str:
    rows = ["| | source | weight | mean rank | cosine to the mean |", "|---|---|---|---|---|"]
    for index, part in enumerate(result["sources"], start=1):
        cosine = "" if part.get("cosine") is None else f"{part['cosine']:.4f}"
        rows.append(f"| {index} | {part['source']} | {part['weight']:.4f} | {part['mean_rank']:.2f} | {cosine} |")
    return "\n".join(rows)


def _modules_table(result: Mapping[str, Any]) -> str:
    numbers = [str(index) for index in range(1, len(result["sources"]) + 1)]
    rows = [f"| module | {' | '.join(numbers)} | merged | error |", "|---" * (len(numbers) + 3) + "|"]
    for name, module in result["modules"].items():
        own = " | ".join(map(str, module["ranks"]))
        rows.append(f"| {name} | {own} | {module['rank']} | {module['merge_error']:.1e} |")
    return "\n".join(rows)
