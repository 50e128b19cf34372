"""`sora-llm estimate CONFIG`: memory per process before anything but the model's config is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sora_llm.commands.common import config_parser, exit_code
from sora_llm.config import load_config
from sora_llm.errors import UserError
from sora_llm.inputs import check_backbone, estimate_memory
from sora_llm.pipeline import MemoryEstimate, memory_table
from sora_llm.topology import World, resolve_strategy


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm estimate") -> int:
    parser = config_parser(
        prog, "Memory per process: weights, adapters, gradients, optimizer state, activations of full batches."
    )
    parser.add_argument("--num-processes", type=int, default=1, help="processes that share the work (default 1)")
    arguments = parser.parse_intermixed_args(argv)

    def command() -> dict[str, Any]:
        if arguments.num_processes < 1:
            raise UserError(f"--num-processes is {arguments.num_processes}; it must be at least 1")
        config = load_config(arguments.config, arguments.overrides)
        world = World(arguments.num_processes, 0, 0)
        strategy = resolve_strategy(config.distributed.strategy, world, {}, config.model.dtype)
        spec, skeleton = check_backbone(config, strategy)
        memory = estimate_memory(config, spec, skeleton, strategy, world.num_processes)
        return {"strategy": strategy, "num_processes": world.num_processes, **asdict(memory)}

    def text(result: dict[str, Any]) -> str:
        fields = {key: value for key, value in result.items() if key not in ("strategy", "num_processes")}
        return (
            f"{result['strategy']} on {result['num_processes']} process(es)\n"
            f"  trainable parameters  {result['trainable_parameters']:,}\n"
            f"  frozen parameters     {result['frozen_parameters']:,}\n"
            f"{memory_table(MemoryEstimate(**fields))}"
        )

    return exit_code(command, arguments.json, text)
