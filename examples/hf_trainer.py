"""SoRA in transformers' Trainer: one Trainer up to the cut, another after it; on one process or several (DDP).

    python examples/hf_trainer.py MODEL DATA.jsonl OUT --load-in-4bit
    torchrun --nproc-per-node 2 examples/hf_trainer.py MODEL DATA.jsonl OUT --load-in-4bit

The same command resumes from the newest checkpoint of the phase it was in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from plain_loop import gated_steps, make_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sora_llm import consensus_prune, inject_sora

WEIGHTS = "adapter.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    train_rows, dev_rows = (common.token_rows(rows, args) for rows in common.text_rows(args))
    model = common.load_base(args)
    torch.manual_seed(args.seed)
    inject_sora(model, r=args.rank, lora_alpha=16)
    accept_adapters(model)

    cut = sum(gated_steps(args))
    trainer = make_trainer(model, train_rows, args.out / "sparsify", range(cut), args)
    go_on(trainer)
    consensus_prune(model, target_rank=args.target_rank)  # first checks that all processes hold the same adapter

    seen = cut * args.batch_size * args.accumulate * trainer.args.world_size % len(train_rows)
    rows = train_rows[seen:] + train_rows[:seen]
    trainer = make_trainer(model, rows, args.out / "finetune", range(cut, args.steps), args)
    go_on(trainer)
    if trainer.is_world_process_zero():
        common.export_and_reload(model, dev_rows, args)


def go_on(trainer: Trainer) -> None:
    """Train from the newest checkpoint of this phase, if there is one.

    The cut is a function of the adapter alone, so a resumed second phase has the same ranks.
    """
    folder = Path(str(trainer.args.output_dir))
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if newest is not None and newest.endswith(f"-{trainer.args.max_steps}"):  # train() would do one step too many
        assert trainer.model is not None
        load_adapter(trainer.model, newest)
    else:
        trainer.train(resume_from_checkpoint=newest)


def accept_adapters(model: Any) -> None:
    """Tell transformers that this model has adapters to train: Trainer refuses a quantised model without them.

    The flag makes `model.save_pretrained` look for PEFT adapters, so `AdapterCheckpoints` does the saving.
    """
    model._hf_peft_config_loaded = True


class AdapterCheckpoints:
    """Makes a Trainer's checkpoints hold the trained parameters instead of the entire quantised base."""

    model: Any
    args: TrainingArguments
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in trained(self.model).items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:  # for load_best_model_at_end
        load_adapter(self.model, self.state.best_model_checkpoint)


class SoraTrainer(AdapterCheckpoints, Trainer):
    """Trainer with checkpoints of the adapter alone."""


class LiveGates(TrainerCallback):
    """Logs the remaining gates next to the loss."""

    def on_log(self, args, state, control, model=None, logs=None, **_others):
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step}: loss {logs['loss']:.4f}{common.live_gates(model)}", flush=True)


def make_trainer(model: nn.Module, rows: Sequence[common.Row], folder: Path, steps: range, args) -> Trainer:
    """A Trainer for `steps`.  Clipping, accumulation and the loss over all processes' tokens are Trainer's."""
    options = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(steps),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",  # the rows are already in random order
        remove_unused_columns=False,
        logging_steps=10,
        save_steps=max(1, len(steps) // 2),
        seed=args.seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    return SoraTrainer(
        model,
        options,
        data_collator=common.collate,
        train_dataset=rows,
        optimizers=make_optimizer(model, args, first_step=steps.start),
        callbacks=[LiveGates()],
    )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name: everything else is frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_adapter(model: nn.Module, checkpoint: str) -> None:
    """Load the adapter's values from a checkpoint of the same phase."""
    tensors, parameters = load_file(Path(checkpoint) / WEIGHTS), trained(model)
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{checkpoint} holds an adapter of other modules or ranks; name another folder, or remove it")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


if __name__ == "__main__":
    main()
