"""The training state in a checkpoint: written, checked, restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm import checkpoint, pipeline
from sora_llm.config import to_dict
from sora_llm.distributed.collectives import gather_integers, gather_objects, on_every, on_main
from sora_llm.errors import UserError
from sora_llm.inject import adapter_parameters, adapters, cut_adapters
from sora_llm.optim import importance_by_module
from sora_llm.running.job import Job
from sora_llm.running.plan import refuse_other_config
from sora_llm.running.training import Best, Training, make_controller
from sora_llm.running.training_data import differing_parts
from sora_llm.schedule import FINETUNE

FORMAT = 2
"""Of state.json, in every checkpoint.  Raise it when a run can no longer resume from what it had before: keys of the
config may be added without, since a missing one takes its default."""


def save_checkpoint(training: Training, unlogged: Mapping[str, float] | None = None) -> None:
    """Write the canonical state of the run as it is (collective; the main process writes).

    `unlogged` holds the fields that the line of this step still needs, if it has not been written.
    """
    job, directory, rounds, step = training.job, training.directory, training.rounds, training.done
    training.tally.pause_clock()
    moments, optimizer_steps = training.engine.optimizer_state()
    tensors = {**training.engine.masters(), **moments}
    state = state_of(training, optimizer_steps, unlogged)
    num_replicas = 0
    best_masters = None if training.best is None else training.best.masters
    if rounds is not None:
        own, index, num_replicas = tensors, rounds.replicas.index, rounds.replicas.num
        tensors = rounds.tensors()

        def begin() -> None:
            directory.require_held()
            checkpoint.begin_replicas(directory.path, step)

        on_main(begin)
        is_lead = rounds.replicas.is_lead
        on_every(lambda: checkpoint.save_replica(directory.path, step, index, own) if is_lead else None)

    def save() -> Path:
        directory.require_held()
        folder = checkpoint.save(directory.path, step, tensors, state, num_replicas, best_masters)
        directory.checkpoint, directory.step = folder, step
        directory.status("running", phase=training.phase)  # name it before the one named so far is dropped
        checkpoint.drop_older(folder, job.config.output.save_total_limit)
        return folder

    directory.checkpoint, directory.step, directory.phase = on_main(save), step, training.phase
    directory.report(to_dict(job.config))


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint for this process; with local updates `moments` is its replica's own.

    `masters`, already in the module, and `moments`, the optimizer's, are float32 by name; `agreed` holds the values
    that all replicas last agreed on (local updates only).
    """

    folder: Path
    state: Mapping[str, Any]
    masters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    agreed: Mapping[str, Tensor]


def refuse_other_run(job: Job, run_dir: Path, folder: Path, state: Mapping[str, Any]) -> None:
    """UserError if this run, in `run_dir`, cannot resume from the checkpoint `folder`, whose state.json is `state`."""
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} was written by another version, whose checkpoints cannot be resumed by this one; resume it with "
            "that version, or use a new output.output_dir (sora-llm export writes its adapter, for model.adapter)"
        )
    if state["stage"]["number"] > 0 and folder.resolve().parent.parent != run_dir.resolve():
        raise UserError(
            f"{folder} is from a later stage of a sparsity path, whose earlier adapters are in "
            f"{folder.parent.parent}; resume there, or start a new path"
        )
    refuse_other_config(job.plan, state["config"], state["num_processes"], job.world, str(folder))
    num_replicas = 0 if job.replicas is None else job.replicas.num
    if "rounds" in state and state["rounds"]["replicas"] != num_replicas:
        raise UserError(
            f"{folder} holds {state['rounds']['replicas']} replicas of a local-update round, but this launch has "
            f"{num_replicas}; launch as many, or start a new run from the adapter with model.adapter"
        )
    if other := differing_parts(state["data"], job.fingerprint):
        raise UserError(
            f"the {other} not those that {folder} was trained on; restore the files, or name a new output.output_dir"
        )


def refuse_other_base(state: Mapping[str, Any], folder: Path, digest: str | None) -> None:
    """UserError if the checkpoint was trained on weights other than those of this `base_digest`."""
    if None not in (digest, state["base"]) and digest != state["base"]:
        raise UserError(
            f"the weights of model.name_or_path are not those that {folder} was trained on; restore them, or "
            "use a new output.output_dir"
        )


def read_into(model: nn.Module, job: Job, folder: Path, state: Mapping[str, Any]) -> Saved:
    """Read the checkpoint's tensors; the injected `model` takes the adapter's values (collective).

    Raises:
        UserError: they do not belong to this model, or one process cannot read them.
    """
    tensors = agreed = on_every(lambda: checkpoint.read_tensors(folder))
    if job.replicas is not None:
        own_file = checkpoint.replica_file(job.replicas.index)
        tensors = on_every(lambda: checkpoint.read_tensors(folder, own_file))
    masters = take_masters(model, tensors, folder, is_cut=state["phase"] == FINETUNE)
    return Saved(folder, state, masters, tensors, agreed)


def state_of(training: Training, optimizer_steps: int, unlogged: Mapping[str, float] | None) -> dict[str, Any]:
    """The state that a checkpoint stores apart from the tensors, as JSON: the values for `restore_training`, and
    those that a resuming run is compared with (collective)."""
    job, engine, rounds, best = training.job, training.engine, training.rounds, training.best
    state: dict[str, Any] = {
        "format": FORMAT,
        "phase": training.phase,
        "stage": {"number": training.stage_number, "first": training.stage_start, "has_ended": training.stage_is_done},
        "optimizer_steps": optimizer_steps,
        "tally": training.tally.state(),
        "steering": training.controller.state(),
        "alarms": training.alarms.state(),
        "patience": training.early_stopping.state(),
        "best": None if best is None else {"step": best.step, "eval_loss": best.eval_loss},
        "unlogged": unlogged,
        "late_round": dict(training.unlogged_round),
        "loss_scale": [engine.loss_scale.state()],
        "num_processes": job.world.num_processes,
        "data": job.fingerprint,
        "base": training.base_digest,
        "order": job.order.position(),
        "config": to_dict(job.config),
    }
    if rounds is not None:
        leads = [members[0] for members in rounds.replicas.members]
        steps, scales = gather_objects(optimizer_steps), gather_integers(engine.loss_scale.state(), engine.device)
        state["optimizer_steps"] = [steps[lead] for lead in leads]
        state["loss_scale"] = [scales[lead] for lead in leads]
        state["rounds"] = rounds.state()
    return state


def restore_training(training: Training, saved: Saved) -> None:
    """Restore the rest of the state into a new training, whose module already has its values (collective)."""
    job, engine, process = training.job, training.engine, training.job.world.process_index
    state, moments, replica = saved.state, saved.moments, 0 if job.replicas is None else job.replicas.index
    own_steps = state["optimizer_steps"] if job.replicas is None else state["optimizer_steps"][replica]
    engine.load(saved.masters, moments, own_steps)
    if training.rounds is not None:
        training.rounds.load(saved.agreed, state["rounds"], engine)
    training.controller = make_controller(job, state["stage"]["number"])
    training.controller.load(state["steering"], importance_by_module(moments))
    training.tally.load(state["tally"], process)
    training.alarms.load(state["alarms"])
    training.early_stopping.load(state["patience"])
    engine.loss_scale.load(state["loss_scale"][replica])
    training.best = read_best(job, saved.folder, state)
    training.done = state["step"]
    training.stage_number, training.stage_start = state["stage"]["number"], state["stage"]["first"]
    training.stage_is_done = state["stage"]["has_ended"]
    training.unlogged, training.unlogged_round = state["unlogged"], state["late_round"]


def read_best(job: Job, folder: Path, state: Mapping[str, Any]) -> Best | None:
    """The best evaluation so far that a checkpoint holds, or None (collective)."""
    said, is_main = state["best"], job.world.is_main
    if said is None:
        return None
    masters = on_every(lambda: checkpoint.read_tensors(folder, checkpoint.BEST) if is_main else {})
    return Best(said["step"], said["eval_loss"], masters)


def take_masters(model: nn.Module, tensors: dict[str, Tensor], folder: Path, is_cut: bool) -> dict[str, Tensor]:
    """Move the adapter's values from `tensors` into the module, cutting it to their shapes if the run was cut.

    Raises:
        UserError: they do not belong to this model.
    """
    if is_cut:
        dtypes = {name: layer.gate.dtype for name, layer in adapters(model).items() if layer.gate is not None}
        factors = {name: (A, B) for name, (A, B, _) in pipeline.factors_of(adapters(model), tensors).items()}
        try:
            cut_adapters(model, {name: (A.to(dtypes[name]), B.to(dtypes[name])) for name, (A, B) in factors.items()})
        except ValueError as error:
            raise UserError(f"the checkpoint {folder} is not of this model: {error}") from None
    parameters = adapter_parameters(model)
    for name, parameter in parameters.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise UserError(f"the checkpoint {folder} is not of this model: {name} is missing or of another shape")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return {name: tensors.pop(name) for name in parameters}
