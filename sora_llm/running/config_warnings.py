"""Warnings about settings that are allowed but probably unintended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from sora_llm.artifacts.lora_files import is_same_base, saved_base
from sora_llm.budget import EVERY_MODULE, LAMBDA_MAX
from sora_llm.config import Config, Data
from sora_llm.files import user_path
from sora_llm.hub import LOGIN, has_token
from sora_llm.prompt_format import has_conversations
from sora_llm.running.data_lineage import lineage_in, lineage_of_base
from sora_llm.running.held_out import seen_dataset, sharing_rows
from sora_llm.running.plan import Plan
from sora_llm.running.unpack import target_modules
from sora_llm.targets import ALL_LINEAR, left_out, matches, stacked_weights


def config_warnings(plan: Plan, skeleton: nn.Module) -> Iterator[str]:
    """Sentences about settings that are allowed but probably unintended."""
    config = plan.config
    if config.model.adapter is not None:
        yield from _of_start(config, user_path(config.model.adapter, "model.adapter"))
    if config.output.push_to_hub and not has_token():
        yield f"output.push_to_hub needs a hub token by the end of the run, and there is none yet: {LOGIN}"
    yield from _of_modules_without_adapter(target_modules(config), skeleton)
    yield from _of_budgets_and_patience(plan)
    yield from _of_steps_that_prune(plan)
    yield from _of_dev_rows(config.data)
    yield from _of_rows_seen_by_the_base(config)
    yield from _of_conversations(config.data)
    yield from _of_thresholds(plan)


def _of_start(config: Config, adapter: Path) -> Iterator[str]:
    """Sentences about the adapter that the run starts from."""
    saved = saved_base(adapter)
    if saved and not is_same_base(saved, config.model.name_or_path):
        yield f"model.adapter is for the base {saved}, this run uses {config.model.name_or_path}; are they the same?"
    yield from _of_rows_seen_before(config, adapter)


def _of_modules_without_adapter(targets: str | Sequence[str], skeleton: nn.Module) -> Iterator[str]:
    """Sentences about weights that are targeted but cannot have an adapter."""
    if targets == ALL_LINEAR and (stacked := stacked_weights(skeleton)):
        yield f"no adapter on {', '.join(stacked)}, which are not linear layers"
    without: dict[str, dict[str, None]] = {}  # {reason: last names}
    for name, reason in left_out(skeleton).items():
        if targets == ALL_LINEAR or matches(name, targets):
            without.setdefault(reason, {})[name.rpartition(".")[2]] = None
    for reason, names in without.items():
        yield f"no adapter on {', '.join(names)}, {reason}"


def _of_budgets_and_patience(plan: Plan) -> Iterator[str]:
    """Sentences about settings that have no effect because of others."""
    sora = plan.config.sora
    has_target = sora.target_rank is not None or sora.target_params is not None
    if sora.budgets and has_target and not any(budget.name == EVERY_MODULE for budget in plan.budgets):
        yield "sora.budgets matches every module, so sora.target_rank or target_params has no effect"
    patience, interval = plan.config.evaluation.early_stopping_patience, plan.config.evaluation.eval_steps
    if patience is not None and interval is not None and (most := plan.most_evaluations(interval)) <= patience:
        yield (
            f"evaluation.early_stopping_patience {patience} cannot stop anything early: with eval_steps {interval} at "
            f"most {most} evaluations count before the last step; lower one of them (the best adapter is kept anyway)"
        )


def _of_steps_that_prune(plan: Plan) -> Iterator[str]:
    """A sentence about a schedule in which nothing is learned, or nothing is pruned step by step."""
    sora = plan.config.sora
    if plan.stages[0].learned_at > plan.stages[0].total_steps:
        yield (
            f"nothing is learned: the learning rate is 0 in all {plan.stages[0].total_steps} steps (warm-up starts at "
            "0); train longer, or without a warm-up"
        )
    elif not all(stage.prunes_in_steps for stage in plan.stages):
        later = ", or raise sora.consensus_at" if sora.consensus_at < 1 else ""
        slots = " (of raw slots; sora.consensus svd keeps more)" if sora.consensus == "slots" else ""
        if plan.budgets:
            what = f"gates are not pruned gradually; only the cut brings the adapters to the budget{slots}"
        else:
            what = f"{'the first stage' if plan.is_path else 'this run'} prunes nothing"
        yield f"the sparsify phase ends before pruning can begin: {what}; train longer{later}"


def _of_conversations(data: Data) -> Iterator[str]:
    """Sentences about options for conversations if there are none."""
    if has_conversations((*data.datasets, *(data.val_datasets or ()))):
        return
    for key, is_set in (
        ("chat_template", data.chat_template is not None),
        ("train_on_last_turn_only", data.train_on_last_turn_only),
    ):
        if is_set:
            yield f"data.{key} is for conversations, but no data set has any: it has no effect here"


def _of_thresholds(plan: Plan) -> Iterator[str]:
    """Sentences about a λ that can prune nothing although it is meant to, or can only prune everything."""
    sora = plan.config.sora
    lambdas = [LAMBDA_MAX if stage.sparse_lambda is None else stage.sparse_lambda for stage in plan.stages]
    # Adam moves a gate, and then the prox; a stage continues from the gates of the one before.
    by_adam = sum(stage.gate_travel for stage in plan.stages)
    by_prox = sum(each * stage.gate_travel for each, stage in zip(lambdas, plan.stages, strict=True))
    if max(by_adam, by_prox) < 1 and sora.threshold == "decoupled" and sora.sparse_lambda != 0:
        if by_adam + by_prox < 1:
            what = f"gates can move by {by_adam + by_prox:.2f} in this run, so none can get from 1 to 0"
        else:
            what = (
                f"the gates' learning rate adds up to {by_adam:.2f} over the steps that prune, so only gates whose "
                "gradient also pushes them there can get from 1 to 0"
            )
        yield f"{what}; train longer, or raise sora.gate_lr"
    highest = max(stage.sparse_lambda or 0.0 for stage in plan.stages)
    if sora.threshold == "decoupled" and highest >= 1:
        yield f"λ is {highest:g}; from 1 upwards the decoupled threshold shrinks every gate regardless of its gradient"


def _of_rows_seen_before(config: Config, adapter: Path) -> Iterator[str]:
    """A sentence about dev rows that the adapter that the run starts from may have been trained on."""
    path = seen_dataset(lineage_in(adapter), config)
    if path is not None and config.data.val_datasets is not None:
        yield f"model.adapter was trained on {path}, which this run evaluates on; name dev rows that it has not seen"
    elif path is not None:
        yield (
            f"model.adapter was trained on {path}, possibly with other rows held out: it may have seen dev rows of "
            "this run; name separate dev rows with data.val_datasets, or hold out the same ones"
        )


def _of_rows_seen_by_the_base(config: Config) -> Iterator[str]:
    """A sentence about dev rows that an adapter merged into the base may have been trained on."""
    if (path := seen_dataset([lineage_of_base(config)], config)) is not None:
        yield (
            f"model.name_or_path has an adapter merged in that was trained on {path}: it may have seen dev rows of "
            "this run; name others with data.val_datasets"
        )


def _of_dev_rows(data: Data) -> Iterator[str]:
    """Sentences about dev rows that are also trained on, or are formatted differently from the training rows."""
    trained_on_too = sharing_rows(data.val_datasets or (), data.datasets)
    for dev in data.val_datasets or ():
        if dev in trained_on_too:
            yield f"rows of data.val_datasets {dev.path} are also trained on, so their loss does not generalise"
        separators = {one.separator for one in data.datasets if one.type == dev.type == "prompt_completion"}
        if separators and dev.separator not in separators:
            yield (
                f"data.val_datasets {dev.path} has the separator {dev.separator!r} after prompts; the training rows "
                f"have {', '.join(map(repr, sorted(separators)))}"
            )
