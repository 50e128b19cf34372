"""`sora-llm evaluate CONFIG [--adapter FOLDER]`: the loss on the config's dev rows, base against adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_llm.backbone import load_backbone
from sora_llm.commands.common import ALONE, config_parser, exit_code
from sora_llm.config import load_config
from sora_llm.distributed import make_accelerator
from sora_llm.errors import UserError
from sora_llm.export import load_adapter
from sora_llm.inputs import check_inputs, load_data
from sora_llm.lora_files import CONFIG
from sora_llm.pipeline import evaluate


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm evaluate") -> int:
    parser = config_parser(prog, "Loss and perplexity over a config's dev rows (data.val_datasets or val_set_size).")
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter to compare with the base")
    arguments = parser.parse_intermixed_args(argv)

    def command() -> dict[str, Any]:
        config = load_config(arguments.config, arguments.overrides)
        inputs = check_inputs(config, "none")
        if arguments.adapter is not None and not (arguments.adapter / CONFIG).is_file():
            raise UserError(f"--adapter {arguments.adapter} holds no {CONFIG}; name an exported adapter")
        accelerator = make_accelerator("none", ALONE)
        rows = load_data(config, inputs, ALONE).dev
        if rows is None:
            raise UserError("the config names no dev rows; set data.val_datasets or data.val_set_size")
        model = load_backbone(inputs.backbone, accelerator.device)

        def loss_of(some_model: Any) -> dict[str, float]:
            found = evaluate(
                some_model,
                rows,
                inputs.batch,
                batch_size=config.evaluation.per_device_eval_batch_size,
                world=ALONE,
                device=accelerator.device,
            )
            return {"loss": found.loss, "perplexity": math.exp(min(found.loss, 700.0))}

        result: dict[str, Any] = {"rows": len(rows), "supervised_tokens": rows.num_supervised, "base": loss_of(model)}
        if arguments.adapter is not None:
            result["adapter"] = loss_of(load_adapter(model, arguments.adapter))
        return result

    def text(result: dict[str, Any]) -> str:
        lines = [f"{result['rows']:,} rows, {result['supervised_tokens']:,} supervised tokens"]
        for name in ("base", "adapter"):
            if name in result:
                lines.append(f"{name:<8} loss {result[name]['loss']:.4f}  perplexity {result[name]['perplexity']:.2f}")
        return "\n".join(lines)

    return exit_code(command, arguments.json, text)
