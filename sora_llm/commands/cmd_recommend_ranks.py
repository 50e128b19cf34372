"""`sora-llm recommend-ranks`: the ranks that an adapter uses, as a config that PEFT or axolotl can train with."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sora_llm.arguments import Parser
from sora_llm.commands.adapter_view import shapes_in_files, spectra_of, target_shapes_of
from sora_llm.commands.common import options_for_keys, run_command
from sora_llm.commands.sizes import add_size_arguments, refuse_empty_result, size_in
from sora_llm.commands.sources import SavedAdapter, read_source
from sora_llm.errors import UserError
from sora_llm.factors import kept_params, mean_rank, scaling_of, shapes_of
from sora_llm.spectrum import lora_options, ranks_within

FORMATS = ("python", "axolotl")


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="A rank and an alpha for every module, from the singular values of a trained adapter: for plain "
        "PEFT as arguments of LoraConfig, or for axolotl.  Without a size every module keeps all that it uses.",
    )
    parser.add_argument("place", metavar="RUN|CHECKPOINT|ADAPTER", help="run directory, checkpoint or LoRA folder")
    add_size_arguments(parser)
    parser.add_argument(
        "--scaling", type=float, metavar="S", help="alpha / rank of every module (default: as the adapter was trained)"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model, if it has moved: the adapter is checked against its config, which is also read without "
        "this option if the files of a pruned adapter do not give the sizes of all targets",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base, if it is read"
    )
    parser.add_argument("--format", choices=FORMATS, default="python", help="of what is printed; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object; lora_config is for PEFT")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm recommend-ranks") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_args(argv)
    as_text = python_snippet if arguments.format == "python" else axolotl_snippet
    options = options_for_keys(arguments)
    return run_command(lambda: recommended(find_source(arguments), arguments), arguments.json, as_text, options)


def find_source(arguments: argparse.Namespace) -> SavedAdapter:
    """The adapter that the command line names; UserError if there is none, or for invalid options."""
    size_in(arguments)  # invalid numbers are refused before a file is read
    if arguments.scaling is not None and not 0 < arguments.scaling < math.inf:
        raise UserError(f"--scaling is {arguments.scaling:g}; it is a number above 0")
    return read_source(arguments.place)


def recommended(source: SavedAdapter, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ranks, their share of the adapter, and the config, as JSON.

    Raises:
        UserError: nothing is left, or the adapter is more than plain LoRA.
    """
    found = spectra_of(source)
    own_shapes = shapes_of(source.factors)
    shapes, pruned, is_whole = all_targets(source, arguments)
    budget = size_in(arguments).params(shapes)
    ranks = ranks_within(found, budget=budget, tolerance=arguments.tolerance, min_rank=arguments.min_rank)
    energy = sum(spectrum.energy for spectrum in found.values())
    kept = kept_params(ranks, own_shapes)
    refuse_empty_result(kept, energy, own_shapes)
    if not any(ranks.values()):
        raise UserError(f"{source.name} changes nothing: every ΔW is 0")
    own = arguments.scaling
    if own is None and source.config is not None:  # the scale that an exported adapter has folded in
        own = source.config.sora.lora_alpha / source.config.sora.r
    scaling = {name: scaling_of(source.scaling, name) if own is None else own for name in found}
    energy_kept = sum(spectrum.share_of_first(ranks[name]) * spectrum.energy for name, spectrum in found.items())
    return {
        "source": source.name,
        "base_model": arguments.base or source.base,
        "mean_rank": mean_rank(dict.fromkeys(shapes, 0) | ranks, shapes),
        "mean_rank_is_of_all_targets": is_whole,
        "kept_params": kept,
        "energy_kept": energy_kept / energy,
        "pruned": [name for name, rank in ranks.items() if not rank] + pruned,
        "lora_config": lora_options(ranks, scaling),
    }


def all_targets(
    source: SavedAdapter, arguments: argparse.Namespace
) -> tuple[dict[str, tuple[int, int]], list[str], bool]:
    """{target: (I, O)}, the targets without factors, and whether these are all targets.

    Raises:
        UserError: the base cannot be read, and was named or is needed for --target-rank.
    """
    try:
        shapes, pruned = target_shapes_of(source, arguments.base, arguments.trust_remote_code)
    except UserError as error:
        if arguments.base is not None:
            raise
        if arguments.target_rank is None:
            return *shapes_in_files(source), False
        raise UserError(
            f"--target-rank is a mean over all targets, and {source.name} has no factors for the pruned ones, so their "
            f"sizes come from the base: {error}; name it with --base MODEL, or use --target-params"
        ) from None
    return shapes, pruned, True


# --------------------------------------------------------------------------------------------------------- snippets


def python_snippet(result: Mapping[str, Any]) -> str:
    """The ranks as a LoraConfig for plain PEFT."""
    options = {**result["lora_config"], "task_type": "CAUSAL_LM"}
    lines = [*_comments(result), "from peft import LoraConfig", "", "config = LoraConfig("]
    lines += [f"    {key}={_python(value)}," for key, value in options.items()]
    return "\n".join([*lines, ")"])


def _python(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{\n" + "".join(f"        {json.dumps(k)}: {v},\n" for k, v in value.items()) + "    }"
    if isinstance(value, list):
        return "[\n" + "".join(f"        {json.dumps(item)},\n" for item in value) + "    ]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def axolotl_snippet(result: Mapping[str, Any]) -> str:
    """The ranks as a config for axolotl, whose alphas are integers."""
    options = result["lora_config"]
    names = options["target_modules"]
    ranks = {name: options["rank_pattern"].get(name, options["r"]) for name in names}
    wanted = {name: options["alpha_pattern"].get(name, options["lora_alpha"]) for name in names}
    alphas = {name: max(1, round(alpha)) for name, alpha in wanted.items()}
    off = max(abs(alphas[name] / wanted[name] - 1) for name in names)
    whole = lora_options(ranks, {name: alphas[name] / ranks[name] for name in names})
    lines = [*_comments(result), "# lora_rank_pattern and lora_alpha_pattern need axolotl 0.18 or later"]
    if off > 1e-9:
        lines += [f"# its alphas are whole numbers: scales are off by up to {off:.0%}; --scaling 1 would be exact"]
    lines += ["adapter: lora  # or qlora, on a 4-bit base"]
    lines += [f"lora_r: {whole['r']}", f"lora_alpha: {whole['lora_alpha']}"]
    lines += ["lora_target_modules:", *(f"  - {name}" for name in whole["target_modules"])]
    for pattern in ("rank_pattern", "alpha_pattern"):
        if whole[pattern]:
            lines += [f"lora_{pattern}:", *(f"  {name}: {value}" for name, value in whole[pattern].items())]
    return "\n".join(lines)


def _comments(result: Mapping[str, Any]) -> list[str]:
    pruned = result["pruned"]
    of = "" if result["mean_rank_is_of_all_targets"] else " (of the modules in the files)"
    left = f"; {len(pruned)} modules of rank 0 are not targets" if pruned else ""
    return [
        f"# ranks of {result['source']}" + (f", base {result['base_model']}" if result["base_model"] else ""),
        f"# mean rank {result['mean_rank']:.2f}{of}, {result['kept_params']:,} parameters, "
        f"{result['energy_kept']:.1%} of ‖ΔW‖²{left}",
    ]
