"""The end of the demo: the result of a run, in a few lines.

python launch/demo_summary.py <run directory>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(run_dir: Path) -> None:
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    certificate = json.loads((run_dir / "adapter" / "certificate.json").read_text("utf-8"))
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text("utf-8"))
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    first, last = metrics[0], metrics[-1]
    modules = certificate["modules"].values()
    verdict = "passed" if certificate["passed"] else "FAILED"
    delta_error = max(module["delta_error"] for module in modules)
    dev_loss = "not measured: there are no dev rows"
    if "eval_loss_exported" in last:
        reloaded = last["eval_loss_exported"]
        dev_loss = f"{first['eval_loss']:.3f} before, {last['eval_loss']:.3f} after ({reloaded:.3f} reloaded)"
    num_pruned = sum(module["rank"] == 0 for module in modules)
    base, adapter = config["base_model_name_or_path"], weights.parent
    print(f"""
dev loss     {dev_loss}
mean rank    {first["mean_rank"]:g} before, {last["mean_rank"]:.2f} after; {num_pruned} of {len(modules)} modules at 0
adapter      {adapter} ({weights.stat().st_size / 2**20:.2f} MiB, {last["kept_params"]:,} parameters kept)
self-check   {verdict}: PEFT reloads it, ΔW within {delta_error:.0e}, logits within {certificate["logits_error"]:.0e}

from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{adapter}")
""")


if __name__ == "__main__":
    main(Path(sys.argv[1]).expanduser())
