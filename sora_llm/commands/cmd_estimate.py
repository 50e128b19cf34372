"""`sora-llm estimate CONFIG`: memory per process and time of a step, from the model's config alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sora_llm.arguments import Parser
from sora_llm.commands.common import config_parser, run_command
from sora_llm.config import load_config
from sora_llm.errors import UserError
from sora_llm.estimates.memory import MemoryEstimate, memory_table
from sora_llm.estimates.step_time import Machines, Work, step_time
from sora_llm.running.inputs import check_backbone
from sora_llm.running.unpack import estimate_memory, step_work
from sora_llm.terminal import plural
from sora_llm.topology import World, resolve_strategy

HARDWARE = {
    "tflops": ("flops", 1e12, "bf16 peak of a GPU, TFLOP/s"),
    "utilisation": (
        "utilisation",
        1.0,
        "share of it that a step reaches; one H200 reached at least 0.22 at 7B, see benchmarks/gpu.md",
    ),
    "gpus-per-node": ("gpus_per_node", 1, "GPUs of a machine"),
    "inside": ("inside", 1e9, "GB/s from and to a GPU inside a machine"),
    "between": ("between", 1e9, "GB/s between machines"),
    "latency": ("latency", 1e-6, "microseconds of a gather for every doubling of the processes"),
}
"""Option: field of Machines, its unit, its description."""


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = config_parser(
        prog,
        "Memory per process (weights, adapters, gradients, optimizer state, activations of full batches), and how long "
        "a step takes on GPUs like those that are assumed: calculated, not measured.",
    )
    parser.add_argument("--num-processes", type=int, default=1, help="processes that share the work (default 1)")
    hardware = parser.add_argument_group("assumed of the GPUs (default: H100 SXM)")
    for option, (field, unit, what) in HARDWARE.items():
        default = getattr(Machines, field) / unit
        hardware.add_argument(
            f"--{option}",
            type=type(unit),
            default=type(unit)(default),
            metavar="N",
            help=f"{what} (default {default:g})",
        )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm estimate") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_intermixed_args(argv)
    return run_command(lambda: estimated(arguments), arguments.json, as_text)


def estimated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory in bytes and the time of a step in seconds, for one process.

    Raises:
        UserError: an invalid config or invalid numbers.
    """
    if arguments.num_processes < 1:
        raise UserError(f"--num-processes is {arguments.num_processes}; it must be at least 1")
    machines = machines_of(vars(arguments))
    config = load_config(arguments.config, arguments.overrides)
    world = World(arguments.num_processes, 0, 0)
    settings = config.distributed
    if settings.strategy == "none" and world.num_processes > 1:
        raise UserError(
            "distributed.strategy is none, which is for one process (config.yaml of a run has the resolved name); "
            f"for --num-processes {world.num_processes} add distributed.strategy=auto, or another one"
        )
    strategy = resolve_strategy(settings.strategy, world, {}, config.model.dtype, sync_every=settings.sync_every)
    spec, skeleton = check_backbone(config, strategy, needs_files=False)
    memory = estimate_memory(config, spec, skeleton, strategy, world.num_processes)
    work = step_work(config, spec, skeleton)
    step = None if work is None else step_as_json(work, strategy, world.num_processes, machines)
    return {"strategy": strategy, "num_processes": world.num_processes, **asdict(memory), "step": step}


def machines_of(options: Mapping[str, Any]) -> Machines:
    """The hardware that the options assume.

    Raises:
        UserError: a number that is not above 0, or a share above 1.
    """
    found = {}
    for option, (field, unit, _) in HARDWARE.items():
        value = options[option.replace("-", "_")]
        if not 0 < value < float("inf") or (field == "utilisation" and value > 1):
            allowed = "above 0 and at most 1" if field == "utilisation" else "above 0"
            raise UserError(f"--{option} is {value:g}; it must be {allowed}")
        found[field] = value * unit
    return Machines(**found)


def step_as_json(work: Work, strategy: str, num_processes: int, machines: Machines) -> dict[str, Any]:
    """The time of a step in seconds, its parts, and what was assumed."""
    step = step_time(work, strategy, num_processes, machines)
    return {**asdict(step), "seconds": step.seconds, "tokens": work.tokens, "assumed": asdict(machines)}


def as_text(result: Mapping[str, Any]) -> str:
    """The result as text for a terminal."""
    about = ("strategy", "num_processes", "step")
    memory = MemoryEstimate(**{key: value for key, value in result.items() if key not in about})
    step, processes = result["step"], result["num_processes"]
    sizes = (
        f"{result['strategy']} on {plural(processes, 'process')}\n"
        f"  trainable parameters  {memory.trainable_parameters:,}\n"
        f"  frozen parameters     {memory.frozen_parameters:,}\n"
        f"{memory_table(memory)}\n"
    )
    if step is None:
        return f"{sizes}the step time is not calculated: the formula is for decoders whose tokens pass every layer"
    machines = Machines(**step["assumed"])
    rate = step["tokens"] * processes / step["seconds"]
    peak = f"{machines.flops / 1e12:g} TFLOP/s at {machines.utilisation:.0%}"
    return (
        f"{sizes}a step of {step['tokens']:,} tokens per process, calculated for GPUs of {peak} (not "
        f"measured; see --help):\n"
        f"  {step['seconds']:.3g} s ({step['compute']:.3g} compute, {step['reduce']:.2g} reduce, {step['gather']:.2g} "
        f"gather), {rate:,.0f} tokens/s over all"
    )
