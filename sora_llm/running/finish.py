"""The end of a run, or of a stage of a path: cut to what the processes agree on, export, reload, answer prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm import export
from sora_llm.artifacts.card import Provenance, story_of_run, worst_delta_error
from sora_llm.backbone import free_unused, from_pretrained_args
from sora_llm.config import Config, recipe, to_dict
from sora_llm.distributed.collectives import on_main
from sora_llm.errors import RunFailed, UserError
from sora_llm.factors import PlainFactors
from sora_llm.generation import sample_answers
from sora_llm.inject import adapters, layer_shapes
from sora_llm.prompt_format import exported_template, plain_separator, prompt_format, prompt_ids
from sora_llm.quantised import is_quantised
from sora_llm.run_files import ADAPTER
from sora_llm.running import verified_export
from sora_llm.running.assembly import cut_adapter
from sora_llm.running.data_lineage import lineage_for_certificate
from sora_llm.running.job import Job
from sora_llm.running.layouts import adapter_layout, export_beside, extra_layout
from sora_llm.running.metrics import dev_loss, final_masters, loss_over, say_alarms
from sora_llm.running.rundir import RunDirectory
from sora_llm.running.start import RunResult
from sora_llm.running.training import Training
from sora_llm.terminal import plural

MEMORISED_ROWS = 256
"""Number of training rows whose loss is measured if there is no dev set to match."""
PROBE_TOKENS = 64
"""Tokens of real text on which logits are compared."""


@dataclass(frozen=True)
class StageResult:
    """A stage's adapter on disk, and the weights before it was cut, from which the next stage continues."""

    exported: verified_export.Exported
    masters: Mapping[str, Tensor]
    factors: PlainFactors | None
    """Those of the exported adapter, on the main process, if another layout is to be written next to it."""


def cut_and_export(training: Training) -> StageResult:
    """Cut the adapter, unless it is already cut, to what the processes agree on, export and reload it (collective)."""
    job, engine, directory = training.job, training.engine, training.directory
    config, is_path = job.config, job.plan.is_path
    directory.step = training.done
    directory.status("running", phase="export")
    training.check_agreement()
    masters = final_masters(training)
    goes_on_from = masters if training.rounds is None else training.rounds.agreed()
    with engine.released() as model:
        ranks = cut_adapter(training, model, masters, dtype=torch.float32).ranks
        job.raise_if_stop_requested()
        fields: dict[str, Any] = {
            **ranks.fields,
            **training.labels,
            **training.unlogged_round,
            "best_step": None if training.best is None else training.best.step,
        }
        if job.data.dev is not None:
            fields["eval_loss"] = dev_loss(job, model)
        found = training.alarms.of_result(fields.get("eval_loss"), start_of(config), training.stage_number)
        say_alarms(job, found)
        fields["alarms"] = training.alarms.take() or None
        if is_path and job.data.train is not None:
            fields["train_loss"] = memorisation(job, model)
        exported = verified_export.export_verified(
            model,
            directory.path / job.plan.folder_of(training.stage),
            adapter_layout(config.output.export_layout),
            provenance=provenance(training, fields),
            allow_empty=config.output.allow_empty_adapter,
            probe_ids=probe(job),
            eval_loss_of=lambda peft_model: None if job.data.dev is None else dev_loss(job, peft_model),
            before_publishing=lambda: before_publishing(training),
        )
        is_written_beside = extra_layout(config.output.export_layout) is not None
        shapes = layer_shapes(adapters(model))
        factors = export.folded_factors(model) if is_written_beside and job.world.is_main else None
        if job.world.is_main and training.stage is job.plan.stages[-1]:
            generate_samples(job, model, directory)
    if exported.eval_loss is not None:
        fields["eval_loss_exported"] = exported.eval_loss
    directory.metrics(training.done, "export", fields)
    directory.ranks(training.done, ranks.ranks, training.labels)
    worst = worst_delta_error(exported.certificate)
    job.say(
        f"mean rank {config.sora.r} → {ranks.mean_rank:.2f}, {ranks.kept_params:,} parameters kept"
        f"{export.stored_in_words(exported.certificate, shapes, ranks.kept_params)}; self-check passed "
        f"(ΔW to {worst:.1e}, logits to {exported.certificate['logits_error']:.1e}); adapter: {exported.folder}",
    )
    return StageResult(exported, goes_on_from, factors)


def before_publishing(training: Training) -> None:
    """Stop if asked to, or if the run directory is no longer this run's (collective)."""
    training.job.raise_if_stop_requested()
    on_main(training.directory.require_held)


def provenance(training: Training, line: Mapping[str, Any]) -> Provenance:
    """The facts about the run for its model card and certificate; `line` is the metrics line of its export."""
    job, config = training.job, training.job.config
    story, notes = story_of_run(line)
    losses = {
        f"dev loss of {start_of(config)}": training.alarms.start_loss,
        "dev loss of the trained adapter": line.get("eval_loss"),
    }
    return Provenance(
        base_model=config.model.name_or_path,
        revision=config.model.revision,
        data=lineage_for_certificate(config),
        metrics={name: loss for name, loss in losses.items() if loss is not None},
        tokenizer_files=job.inputs.tokenizer_files,
        chat_template=exported_template(config, job.inputs.tokenizer),
        separator=plain_separator(config),
        load_options=from_pretrained_args(job.inputs.backbone, job.inputs.skeleton.config),
        base_loading=job.inputs.backbone.loading,
        base_digest=training.base_digest,
        is_base_quantised=is_quantised(job.inputs.skeleton.config),
        story=story,
        notes=notes,
        recipe=f"# {job.rows_per_step_text} a step, from {plural(job.world.num_processes, 'process')}\n"
        f"{recipe(config)}",
    )


def start_of(config: Config) -> str:
    """A description of what training started from."""
    return "the base" if config.model.adapter is None else "the adapter that it started from"


def finish(training: Training, result: StageResult) -> RunResult:
    """Make the last stage's adapter the run's, and conclude the run (collective)."""
    job, directory = training.job, training.directory
    adapter = directory.path / ADAPTER
    if job.plan.is_path:
        on_main(directory.require_held)
        on_main(lambda: export.copy_adapter(result.exported.folder, adapter))
    directory.adapter = adapter
    export_extra_layout(training, result)
    directory.status("finished", phase="done")
    if job.world.is_main:
        job.stop.remove_file()  # it came too late, and would stop the next launch, which says what is finished
    directory.report(to_dict(job.config), plots=True)
    metrics, status = on_main(lambda: (directory.last_metrics, directory.last_status))
    return RunResult(adapter, metrics, status)


def export_extra_layout(training: Training, result: StageResult) -> None:
    """Write the adapter again as gguf/ or merged/ if the config asks for it; the main process writes (collective)."""
    job, factors = training.job, result.factors
    layout = extra_layout(job.config.output.export_layout)
    if layout is None:
        return
    job.raise_if_stop_requested()
    del training.engine.module
    free_unused()  # under ZeRO the model is part of cycles, and the base is about to be loaded again
    line = training.directory.last_metrics

    def write() -> str:
        assert factors is not None, "they are the main process's"
        training.directory.require_held()
        run_dir, device = training.directory.path, job.accelerator.device
        try:
            return export_beside(
                layout, job.inputs, factors, run_dir, provenance=provenance(training, line), device=device
            )
        except UserError as error:  # `check_layout` found nothing when the run began
            raise RunFailed(f"{layout} could not be written next to the adapter, which is complete: {error}") from error

    job.say(on_main(write))


def memorisation(job: Job, model: nn.Module) -> float:
    """The loss of `model` over evenly spaced training rows, as many as there are dev rows (collective)."""
    assert job.data.train is not None
    count = min(len(job.data.train), MEMORISED_ROWS if job.data.dev is None else len(job.data.dev))
    rows = [index * len(job.data.train) // count for index in range(count)]
    return loss_over(job, model, job.data.train.select(rows))


def generate_samples(job: Job, model: nn.Module, directory: RunDirectory) -> None:
    """Print and save the answers to evaluation.sample_prompts; on one process, once the adapter is safely on disk.

    If the model cannot generate, only the samples are lost, not the run.
    """
    tokenizer, template = job.inputs.tokenizer, job.inputs.chat_template
    prompts = {
        prompt: prompt_ids(job.config, tokenizer, template, prompt) for prompt in job.config.evaluation.sample_prompts
    }
    if not prompts:
        return
    try:
        answers = sample_answers(model, tokenizer, prompts, prompt_format(job.config, tokenizer, template).stop)
    except Exception as error:
        job.say(f"evaluation.sample_prompts could not be answered: {type(error).__name__}: {error}")
        return
    directory.samples(answers)
    for answer in answers:
        job.say(f"> {answer['prompt']}\n  base:    {answer['base']!r}\n  adapted: {answer['adapted']!r}")


def probe(job: Job) -> Tensor:
    """Token ids (1, T) of real text for the export's logits check: the start of the longest row."""
    rows = job.data.dev if job.data.dev is not None else job.order.sample()
    longest = int(rows.lengths.argmax())
    return torch.tensor(rows[longest][0][:PROBE_TOKENS].tolist())[None]
