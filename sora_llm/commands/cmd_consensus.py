"""`sora-llm consensus SOURCE SOURCE … --out FOLDER`: adapters trained apart become one, verified on their base."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_llm import checkpoint
from sora_llm.backbone import (
    TOKENIZER_FILES,
    BackboneSpec,
    dtype_name,
    load_backbone,
    load_config,
    skeleton,
    tokenizer_files,
)
from sora_llm.commands.common import ALONE, exit_code
from sora_llm.config import Config
from sora_llm.config import load_config as load_run_config
from sora_llm.consensus import Factors, Scaling, kept_ranks, mean_rank, scaling_of, shapes_of
from sora_llm.distributed import make_accelerator
from sora_llm.errors import UserError
from sora_llm.export import LAYOUTS, Provenance, export_adapter
from sora_llm.files import user_path
from sora_llm.inject import cut_adapters, inject_sora, target_linears
from sora_llm.inputs import backbone_spec, quiet_libraries, target_modules
from sora_llm.lora_files import CERTIFICATE, CONFIG, is_same_base, read_lora
from sora_llm.merge import Merged, Replica, merge, merge_errors


@dataclass(frozen=True)
class Source:
    """An adapter to merge: its factors by module, its targets (a pruned one has no factors), what it was trained on.

    `selector` chooses the targets on the base (of a checkpoint: one that was cut does not name what it lost), `spec` is
    how its base was loaded where that is known, `folder` where its tokenizer files are, if it has any.
    """

    name: str
    base: str
    revision: str | None
    factors: Factors
    scaling: Scaling
    targets: frozenset[str]
    selector: str | list[str] | None = None
    spec: BackboneSpec | None = None
    data: tuple[str, ...] = ()
    folder: Path | None = None

    def on(self, bare_model: nn.Module) -> Source:
        """With all targets that it has on this base."""
        if self.selector is None:
            return self
        return replace(self, targets=self.targets | target_linears(bare_model, self.selector).keys())

    @property
    def ranks(self) -> dict[str, int]:
        """{module: live slots}."""
        slots = {name: A.shape[0] for name, (A, _, _) in self.factors.items()}
        gated = kept_ranks({name: gate for name, (_, _, gate) in self.factors.items() if gate is not None})
        return {name: gated.get(name, slots.get(name, 0)) for name in sorted(self.targets)}


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm consensus") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Merge adapters of one base: the singular components of the mean of their products.  Sources are "
        "run directories, checkpoints and any PEFT LoRA folders.  Without a size nothing is lost.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="run directory, checkpoint or LoRA folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the merged adapter's new folder")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per source, any scale (default: 1)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target-rank", type=float, metavar="N", help="keep at most this mean rank, weighted by I + O")
    size.add_argument("--target-params", type=int, metavar="N", help="keep at most so many parameters")
    size.add_argument("--tolerance", type=float, metavar="T", help="drop what is below this relative error of ΔW")
    parser.add_argument("--min-rank", type=int, default=0, metavar="N", help="ranks that every module keeps")
    parser.add_argument("--layout", choices=LAYOUTS, default="padded")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where the sources name another place for it")
    parser.add_argument(
        "--allow-missing", action="store_true", help="a module that only some sources have counts as 0 in the others"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    def command() -> dict[str, Any]:
        check_numbers(arguments)
        folders = [user_path(text, "SOURCE") for text in arguments.sources]
        out = arguments.out.absolute()
        check_out(out, folders)
        quiet_libraries()
        sources = [read_source(folder) for folder in folders]
        spec = replace(base_of(sources, arguments.base), trust_remote_code=arguments.trust_remote_code)
        bare_model = skeleton(load_config(spec), spec)
        sources = [source.on(bare_model) for source in sources]
        refuse_other_targets(sources, arguments.allow_missing)
        shapes = shapes_in(spec, bare_model, sources)
        largest = max(arguments.weights or [1.0])
        weights = [weight / largest for weight in arguments.weights or [1.0] * len(sources)]
        replicas = [replica(source, weight, shapes) for source, weight in zip(sources, weights, strict=True)]
        merged = merge(replicas, budget_of(arguments, shapes), arguments.tolerance, arguments.min_rank)
        if merged.report.kept_cost == 0 and merged.report.energy > 0:
            raise UserError(
                f"the size leaves nothing: the cheapest rank takes {min(i + o for i, o in shapes.values()):,} "
                "parameters; give more"
            )
        result = described(sources, merged, merge_errors(replicas, merged.factors), weights)
        certificate = export_merged(sources, merged, spec, arguments.layout, out, result)
        del certificate["merge"]  # said already
        return {"adapter": str(arguments.out), "layout": arguments.layout, **result, "certificate": certificate}

    return exit_code(command, arguments.json, as_text)


# ----------------------------------------------------------------------------------------------------------- checks


def check_numbers(arguments: argparse.Namespace) -> None:
    """UserError for numbers that cannot be, before a file is read."""
    weights, count = arguments.weights, len(arguments.sources)
    if weights is not None and len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} sources; give one for each")
    if weights is not None and not (all(0 <= w < math.inf for w in weights) and any(weights)):
        raise UserError(f"--weights {' '.join(f'{w:g}' for w in weights)}: they are numbers from 0, not all of them 0")
    if arguments.target_rank is not None and not 0 < arguments.target_rank < math.inf:
        raise UserError(f"--target-rank is {arguments.target_rank:g}; it is a mean rank above 0")
    if arguments.target_params is not None and arguments.target_params < 1:
        raise UserError(f"--target-params is {arguments.target_params}; it is a number of parameters above 0")
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < 1:
        raise UserError(f"--tolerance is {arguments.tolerance:g}; it is a relative error, 0 or more and below 1")
    if arguments.min_rank < 0 or (arguments.min_rank and arguments.target_rank is arguments.target_params is None):
        raise UserError(
            f"--min-rank is {arguments.min_rank}; it is 0 or more, and needs --target-rank or --target-params"
        )


def check_out(out: Path, folders: Sequence[Path]) -> None:
    """UserError where the merged adapter would replace something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--out {out} is one of the sources; name another folder")
    if out.is_dir() and any(out.iterdir()) and not _is_merged(out):
        raise UserError(f"--out {out} exists and holds no merged adapter; name another folder, it would be replaced")


def _is_merged(folder: Path) -> bool:
    try:
        return "merge" in json.loads((folder / CERTIFICATE).read_text())
    except (OSError, ValueError, TypeError):
        return False


def refuse_other_targets(sources: Sequence[Source], allow_missing: bool) -> None:
    """UserError if the sources adapt different modules, unless that is allowed."""
    first = sources[0]
    for source in sources[1:]:
        odd = sorted(source.targets ^ first.targets)
        if odd and not allow_missing:
            here, there = (first, source) if odd[0] in first.targets else (source, first)
            raise UserError(
                f"{here.name} adapts {odd[0]} and {there.name} does not ({len(odd)} modules differ); adapters of other "
                "targets can only be merged as if they were 0 there: --allow-missing"
            )


def base_of(sources: Sequence[Source], base: str | None) -> BackboneSpec:
    """How to load the one base of all sources: as the first run did, or in its own dtype.

    Raises:
        UserError: they name different bases, or none.
    """
    named = [source for source in sources if source.base]
    if base is not None:
        known = next((source.spec for source in sources if source.spec is not None), None)
        if known is not None:
            return replace(known, name_or_path=base, revision=None)
        spec = BackboneSpec(base)
        return replace(spec, dtype=dtype_name(load_config(spec)))
    if not named:
        raise UserError("no source says which base it is of; name it with --base MODEL")
    first = named[0]
    for other in named[1:]:
        if not is_same_base(first.base, other.base):
            raise UserError(
                f"{first.name} is of the base {first.base} and {other.name} of {other.base}; only adapters of one base "
                "can be merged (--base MODEL, if these are copies of one model)"
            )
        if (first.revision or "main") != (other.revision or "main") and not Path(first.base).expanduser().is_dir():
            raise UserError(
                f"{first.name} is of revision {first.revision or 'main'} of {first.base} and {other.name} of "
                f"{other.revision or 'main'}; only adapters of one base can be merged (--base MODEL, if they are equal)"
            )
    known = next((source.spec for source in named if source.spec is not None), None)
    if known is not None:
        return known
    spec = BackboneSpec(first.base, revision=first.revision)
    return replace(spec, dtype=dtype_name(load_config(spec)))


def shapes_in(spec: BackboneSpec, bare_model: nn.Module, sources: Sequence[Source]) -> dict[str, tuple[int, int]]:
    """{module: (I, O)} of everything that a source adapts, from the base's config alone.

    Raises:
        UserError: a source that does not fit the base.
    """
    linears = target_linears(bare_model)
    shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    for source in sources:
        missing = sorted(source.targets - shapes.keys())
        if missing:
            raise UserError(
                f"{source.name} adapts {missing[0]}, which is no layer of {spec.name_or_path} that can be merged "
                "(linear ones, but for the output head)"
            )
        for name, found in shapes_of(source.factors).items():
            if found != shapes[name]:
                raise UserError(
                    f"{source.name} has {name} as {found[0]} → {found[1]}, {spec.name_or_path} as {shapes[name][0]} → "
                    f"{shapes[name][1]}; it is an adapter of another base"
                )
    everywhere = frozenset().union(*(source.targets for source in sources))
    return {name: shape for name, shape in shapes.items() if name in everywhere}


def replica(source: Source, weight: float, shapes: Mapping[str, tuple[int, int]]) -> Replica:
    """With empty factors for the modules that the source lacks: what is pruned everywhere is a target all the same."""
    factors, scaling = {}, {}
    for name, (num_in, num_out) in shapes.items():
        factors[name] = source.factors.get(name, (torch.zeros(0, num_in), torch.zeros(num_out, 0), None))
        scaling[name] = scaling_of(source.scaling, name) if name in source.factors else 1.0
    return Replica(weight, factors, scaling)


def budget_of(arguments: argparse.Namespace, shapes: Mapping[str, tuple[int, int]]) -> int | None:
    """What may be kept, in parameters; None without a budget."""
    if arguments.target_rank is None:
        budget: int | None = arguments.target_params
        return budget
    return math.floor(Fraction(str(arguments.target_rank)) * sum(i + o for i, o in shapes.values()))


# ---------------------------------------------------------------------------------------------------------- sources


def read_source(folder: Path) -> Source:
    """The adapter that a path means.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; a source is a run directory, a checkpoint or a LoRA folder")
    if (folder / CONFIG).is_file():
        return _of_lora(folder)
    if (folder / checkpoint.COMPLETE).is_file() or (folder / checkpoint.STATE).is_file():
        return _of_checkpoint(folder)
    if (folder / "config.yaml").is_file():
        if not (folder / "adapter" / CONFIG).is_file():
            raise UserError(
                f"{folder} has no adapter yet; start its command again to let it finish, or name one of its "
                f"checkpoints ({folder / 'checkpoints'})"
            )
        return _of_run(folder)
    raise UserError(
        f"{folder} is no run directory (config.yaml), checkpoint ({checkpoint.COMPLETE}) or LoRA ({CONFIG})"
    )


def _of_lora(folder: Path) -> Source:
    lora = read_lora(folder)
    return Source(str(folder), lora.base_model, lora.revision, lora.factors, lora.scaling, lora.targets, folder=folder)


def _of_run(run_dir: Path) -> Source:
    config, lora = load_run_config(run_dir / "config.yaml"), read_lora(run_dir / "adapter")
    return Source(
        str(run_dir),
        config.model.name_or_path,
        config.model.revision,
        lora.factors,
        lora.scaling,
        lora.targets,
        spec=backbone_spec(config, "none"),
        data=_data(config),
        folder=run_dir / "adapter",
    )


def _of_checkpoint(folder: Path) -> Source:
    state = checkpoint.read_state(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:  # JSON is YAML, and only config.py reads configs
        json.dump(state["config"], file)
        file.flush()
        config = load_run_config(file.name)
    tensors = checkpoint.read_tensors(folder)
    names = dict.fromkeys(key.rpartition(".lora_A")[0] for key in tensors if key.endswith(".lora_A"))
    factors = {n: (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"], tensors.get(f"{n}.gate")) for n in names}
    return Source(
        str(folder),
        config.model.name_or_path,
        config.model.revision,
        factors,
        config.sora.lora_alpha / config.sora.r,
        frozenset(names),
        selector=target_modules(config),
        spec=backbone_spec(config, "none"),
        data=_data(config),
    )


def _data(config: Config) -> tuple[str, ...]:
    return tuple(dataset.path for dataset in config.data.datasets)


# ----------------------------------------------------------------------------------------------------------- result


def described(
    sources: Sequence[Source], merged: Merged, errors: Mapping[str, float], weights: Sequence[float]
) -> dict[str, Any]:
    """What became of the sources, as JSON: each one's part, and who kept what in every module."""
    shapes = {name: (A.shape[1], B.shape[0]) for name, (A, B) in merged.factors.items()}
    costs = {name: i + o for name, (i, o) in shapes.items()}
    ranks = [{name: source.ranks.get(name, 0) for name in costs} for source in sources]
    report, replicas = merged.report, iter(merged.replicas)
    parts = []
    for source, own, weight in zip(sources, ranks, weights, strict=True):
        part: dict[str, Any] = {"source": source.name, "weight": 0.0, "mean_rank": mean_rank(own, costs)}
        if weight > 0:
            seen = next(replicas)
            part |= {"weight": seen.weight, "cosine": seen.cosine, "distance": seen.distance}
        parts.append(part)
    return {
        "sources": parts,
        "mean_rank": mean_rank(report.ranks, costs),
        "kept_params": report.kept_cost,
        "merge_error": math.sqrt(report.dropped_energy / report.energy) if report.energy else 0.0,
        "shortfall": report.shortfall,
        "jaccard": merged.jaccard,
        "modules": {
            name: {"ranks": [own[name] for own in ranks], "rank": report.ranks[name], "merge_error": errors[name]}
            for name in costs
        },
    }


def export_merged(
    sources: Sequence[Source],
    merged: Merged,
    spec: BackboneSpec,
    layout: str,
    out: Path,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the merged factors on the base and export them with the self-check; returns the certificate."""
    model = load_backbone(spec, make_accelerator("none", ALONE).device)
    inject_sora(model, r=1, lora_alpha=1, target_modules=list(merged.factors))  # scale 1, as the merged factors are
    cut_adapters(model, merged.factors)
    per_source = [_tokenizer_files(source.folder) for source in sources if source.folder is not None]
    files = next((found for found in per_source if found), None) or tokenizer_files(spec)
    provenance = Provenance(
        base_model=spec.name_or_path,
        data=list(dict.fromkeys(path for source in sources for path in source.data)),
        tokenizer_files=files,
        load_options=spec.load_call,
        story=f"Merged from {len(sources)} adapters (singular components of the mean of their products)",
        beside="verified",
        notes={"merge": dict(result)},
        details=f"## Merge\n{_sources_table(result)}\n\nWho kept what:\n\n{_modules_table(result)}\n\n",
    )
    return export_adapter(model, out, layout, allow_empty=True, provenance=provenance)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def as_text(result: Mapping[str, Any]) -> str:
    """For a terminal: a line per source, ranks by projection, where the result lies."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for name, module in result["modules"].items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(module)
    count = len(result["sources"])
    lines = [
        f"{index}  {part['source']}: weight {part['weight']:.3f}, mean rank {part['mean_rank']:.2f}"
        + (f", cosine to the mean {part['cosine']:.3f}" if part.get("cosine") is not None else "")
        for index, part in enumerate(result["sources"], start=1)
    ]
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
        f"parameters{short}; relative merge error {result['merge_error']:.2e}; self-check passed",
    ]
    return "\n".join(lines)


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
