"""SoRA in TRL's SFTTrainer, which tokenises and packs the rows: one trainer up to the cut, one after it.

    pip install '.[examples]'
    python examples/trl_sft.py MODEL DATA.jsonl OUT --load-in-4bit --packing

The same command resumes from the newest checkpoint of the phase it was in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from datasets import Dataset
from hf_trainer import AdapterCheckpoints, LiveGates, accept_adapters, go_on, trained
from plain_loop import gated_steps, make_optimizer
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sora_llm import consensus_prune, inject_sora


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parser(__doc__)
    arguments.add_argument("--packing", action="store_true", help="best-fit packing of rows into sequences")
    args = arguments.parse_args(argv)
    train_rows, dev_rows = common.text_rows(args)
    model = common.load_base(args)
    torch.manual_seed(args.seed)
    inject_sora(model, r=args.rank, lora_alpha=16)
    accept_adapters(model)

    cut = sum(gated_steps(args))
    trainer = make_trainer(model, train_rows, args.out / "sparsify", range(cut), args, seed=args.seed)
    go_on(trainer)
    consensus_prune(model, target_rank=args.target_rank)
    trainer = make_trainer(model, train_rows, args.out / "finetune", range(cut, args.steps), args, seed=args.seed + 1)
    go_on(trainer)
    if trainer.is_world_process_zero():
        common.export_and_reload(model, common.token_rows(dev_rows, args), args)


class SoraSFTTrainer(AdapterCheckpoints, SFTTrainer):
    """SFTTrainer with checkpoints of the adapter alone."""


def make_trainer(
    model: Any, rows: Sequence[dict[str, str]], folder: Path, steps: range, args, seed: int
) -> SoraSFTTrainer:
    """A trainer for `steps`; `seed` sets the order of rows, which a second phase would otherwise repeat from the start.

    The loss covers the completions, as TRL does for rows of prompt and completion.
    """
    options = SFTConfig(
        output_dir=str(folder),
        max_length=args.sequence_len,
        packing=args.packing,
        max_steps=len(steps),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=max(1, len(steps) // 2),
        seed=seed,
        report_to=[],
        bf16=False,  # no autocast: base and adapter have their own dtypes
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    trainer = SoraSFTTrainer(
        model,
        options,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        optimizers=make_optimizer(model, args, first_step=steps.start),
        callbacks=[LiveGates()],
    )
    for parameter in trained(model).values():  # SFTTrainer rounds the adapter of a quantised base to bfloat16
        parameter.data = parameter.data.float()
    return trainer


if __name__ == "__main__":
    main()
