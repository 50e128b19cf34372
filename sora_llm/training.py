"""A run in the middle of its loop: what it holds, how it comes to be, what it says, saves and measures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm import checkpoint, pipeline
from sora_llm.alarms import Alarms, Patience
from sora_llm.backbone import DTYPES, computes_in_float16, load_backbone
from sora_llm.config import to_dict
from sora_llm.data.dataset import TokenDataset
from sora_llm.distributed.collectives import gather_integers, gather_objects, on_every, on_main
from sora_llm.distributed.engine import Engine
from sora_llm.errors import UserError
from sora_llm.evaluation import evaluate
from sora_llm.inject import adapter_parameters, adapters, cut_adapters, inject_sora, start_from
from sora_llm.inputs import start_lora
from sora_llm.job import Job, say
from sora_llm.local_updates import OuterOptimizer
from sora_llm.loop import Tally, peak_memory_gib
from sora_llm.loss_scale import LossScale
from sora_llm.optim import IMPORTANCE, ProxAdamW, parameter_groups
from sora_llm.packing_proof import prove_packing
from sora_llm.pipeline import Cut
from sora_llm.plan import Stage
from sora_llm.rounds import Rounds
from sora_llm.rundir import RunDirectory
from sora_llm.schedule import DENSE, FINETUNE
from sora_llm.start import StartPoint
from sora_llm.steering import Steering
from sora_llm.unpack import target_modules


@dataclass(frozen=True)
class Best:
    """The adapter of the lowest dev loss of the finetune phase; its masters are on the main process, {} elsewhere."""

    step: int
    eval_loss: float
    masters: Mapping[str, Tensor]


@dataclass
class Training:
    """A run in the middle of its loop.  `done` counts the optimizer steps behind it, `first` those before its stage."""

    job: Job
    directory: RunDirectory
    engine: Engine
    tally: Tally
    steering: Steering
    alarms: Alarms
    patience: Patience
    rounds: Rounds | None = None
    """Of local updates; None where all processes step together."""
    stage_number: int = 0
    first: int = 0
    done: int = 0
    has_ended: bool = False
    """Whether the last step of the stage is behind it; patience may have chosen which one that is."""
    alarmed: list[str] = field(default_factory=list)
    """Alarms that wait for the next line of metrics."""
    late_round: Mapping[str, Any] = field(default_factory=dict)
    """What is to be said of a round that ended after the last step's line."""
    best: Best | None = None
    """Where patience counts evaluations of the finetune phase."""
    measured: int | None = None
    """The step whose dev loss was measured last, by this process."""
    unlogged: Mapping[str, Any] | None = None
    """What the line of step `done` needs, where the run was interrupted before it could be written."""

    @property
    def stage(self) -> Stage:
        return self.job.plan.stages[self.stage_number]

    @property
    def phase(self) -> str:
        """Of the step that is behind it."""
        return self.stage.phases.at(max(0, self.done - self.first - 1))

    @property
    def agrees(self) -> bool:
        """Whether all processes hold the same adapter: always, but for inside a round of local updates."""
        return self.rounds is None or self.rounds.in_agreement

    def prove_agreement(self) -> None:
        """Compare what the processes hold in common, between steps (collective).

        Raises:
            RunFailed: it differs.
        """
        if self.rounds is None:
            self.engine.prove_agreement()
        else:
            self.rounds.prove(self.engine)

    @property
    def labels(self) -> dict[str, Any]:
        """What every line of a path says."""
        if not self.job.plan.is_path:
            return {}
        return {"stage": self.stage_number, "sparse_lambda": self.stage.sparse_lambda}


def load_model(job: Job) -> nn.Module:
    """The frozen backbone on this process's device."""
    spec, device, data = job.inputs.backbone, job.accelerator.device, job.config.data
    model = load_backbone(spec, device, gradient_checkpointing=job.config.train.gradient_checkpointing)
    if data.sample_packing:
        prove_packing(model, spec.attn_implementation, device, is_8bit=spec.load_in_8bit)
    return model


def load_and_inject(job: Job, directory: RunDirectory, start: StartPoint) -> Training:
    """The frozen backbone with fresh or resumed adapters, under its engine (collective)."""
    sora = job.config.sora
    model = on_every(lambda: load_model(job))
    torch.manual_seed(job.config.train.seed)
    inject_sora(model, sora.r, sora.lora_alpha, sora.lora_dropout, target_modules(job.config), DTYPES[sora.dtype])
    full_params = pipeline.full_params(adapters(model))
    folder, state = start.folder, start.state
    tensors: dict[str, Tensor] = {}  # of this replica
    agreed: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}
    if folder is not None and state is not None:
        tensors = agreed = on_every(lambda: checkpoint.read_tensors(folder))
        if job.replicas is not None:
            own_file = checkpoint.replica_file(job.replicas.index)
            tensors = on_every(lambda: checkpoint.read_tensors(folder, own_file))
        masters = take_masters(model, tensors, folder, is_cut=state["phase"] == FINETUNE)
    elif job.config.model.adapter is not None:
        on_every(lambda: warm_start(job, model))
    engine = make_engine(job, model)  # after the module has its values: ZeRO copies its masters from there
    training = Training(
        job,
        directory,
        engine,
        Tally.start(engine.device),
        make_steering(job, 0),
        Alarms(job.plan.budgets, full_params),
        Patience(job.config.evaluation.early_stopping_patience),
        make_rounds(job),
    )
    if folder is not None and state is not None:
        put_back(training, folder, state, masters, tensors, agreed)
    elif training.rounds is not None:
        training.rounds.begin(engine)
    return training


def put_back(
    training: Training,
    folder: Path,
    state: Mapping[str, Any],
    masters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    agreed: Mapping[str, Tensor],
) -> None:
    """Give a training that is new what the checkpoint in `folder` holds (collective).

    `masters` and `tensors`, the optimizer's, are this replica's; `agreed` is what all replicas agreed on last.
    """
    job, engine, process = training.job, training.engine, training.job.world.process_index
    own_steps = state["optimizer_steps"] if job.replicas is None else state["optimizer_steps"][job.replicas.index]
    engine.load(masters, tensors, own_steps)
    if training.rounds is not None:
        training.rounds.load(agreed, state["rounds"], engine)
    training.steering = make_steering(job, state["stage"]["number"])
    training.steering.load(
        state["steering"],
        {name.removesuffix(IMPORTANCE_SUFFIX): tensors[name] for name in tensors if name.endswith(IMPORTANCE_SUFFIX)},
    )
    training.tally.load(state["tally"], process)
    training.alarms.load(state["alarms"])
    training.patience.load(state["patience"])
    if "loss_scale" in state:  # of each replica
        engine.loss_scale.load(state["loss_scale"][0 if job.replicas is None else job.replicas.index])
    training.best = read_best(job, folder, state)
    training.done = state["step"]
    training.stage_number, training.first = state["stage"]["number"], state["stage"]["first"]
    training.has_ended = state["stage"]["has_ended"]
    training.alarmed = state["alarms"]["waiting"]
    training.unlogged, training.late_round = state["unlogged"], state.get("late_round", {})


def read_best(job: Job, folder: Path, state: Mapping[str, Any]) -> Best | None:
    """What a checkpoint holds of the best evaluation so far (collective)."""
    said, is_main = state.get("best"), job.world.is_main
    if said is None:
        return None
    masters = on_every(lambda: checkpoint.read_tensors(folder, checkpoint.BEST) if is_main else {})
    return Best(said["step"], said["eval_loss"], masters)


def warm_start(job: Job, model: nn.Module) -> None:
    """Let the adapters begin where the saved one ended."""
    lora = start_lora(job.config)
    start_from(model, lora.factors, lora.scaling)


def make_steering(job: Job, stage_number: int) -> Steering:
    """A fresh one for a stage."""
    sparse_lambda = job.plan.stages[stage_number].sparse_lambda
    return Steering(str(job.config.sora.threshold), job.plan.budgets, sparse_lambda)


IMPORTANCE_SUFFIX = f".gate.{IMPORTANCE}"


def take_masters(model: nn.Module, tensors: dict[str, Tensor], folder: Path, is_cut: bool) -> dict[str, Tensor]:
    """Move the adapter's values from `tensors` into the module, which is cut to their shapes where the run was.

    Raises:
        UserError: they are not of this model.
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


def make_engine(job: Job, model: nn.Module, loss_scale: LossScale | None = None) -> Engine:
    """`model` and a fresh optimizer under the run's strategy, with the loss scale of an engine before it, if there was
    one (collective)."""
    settings, budgets = job.config.train, job.plan.budgets
    groups = parameter_groups(
        model,
        settings.learning_rate,
        job.plan.stages[0].gate_lr,
        weight_decay=settings.weight_decay,
        threshold=str(job.config.sora.threshold),
        budgets={budget.name: list(budget.costs) for budget in budgets} or None,
        deferred=job.replicas is not None,
    )
    optimizer, strategy = ProxAdamW(groups), job.plan.strategy
    if loss_scale is None:
        loss_scale = LossScale(computes_in_float16(job.inputs.backbone))
    return Engine(job.accelerator, model, optimizer, strategy, settings.max_grad_norm, job.replicas, loss_scale)


def renew_engine(
    training: Training, model: nn.Module, masters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Go on with a fresh optimizer, in a round of its own, from `masters` that all processes hold (collective)."""
    training.engine = make_engine(training.job, model, training.engine.loss_scale)
    training.engine.load(masters, state, 0)
    if training.rounds is not None:
        training.rounds.begin(training.engine)


def make_rounds(job: Job) -> Rounds | None:
    """The rounds of local updates, not begun; None where all processes step together."""
    if job.replicas is None:
        return None
    settings = job.config.distributed
    return Rounds(job.replicas, OuterOptimizer(settings.outer_learning_rate, settings.outer_momentum))


def log_step(training: Training, seen: Mapping[str, Any]) -> None:
    """The line of the step that is done (collective); `seen` is what only the step itself knew."""
    job, tally, done, stage = training.job, training.tally, training.done, training.stage
    step_of_stage, phase = done - training.first - 1, training.phase
    rates = stage.rates(step_of_stage)
    tally.pause_clock()
    ranks = current_ranks(training)
    evaluated = {"eval_loss": measure(training)} if evaluation_due(job, done) else {}
    fields: dict[str, Any] = {
        **tally.flush(),
        "learning_rate": rates["learning_rate"],
        "gate_learning_rate": rates["gate_lr"] if phase != FINETUNE else None,
        **seen,
        "skipped_steps": skipped_steps(training),
        "loss_scale": training.engine.loss_scale.factor if training.engine.loss_scale.is_needed else None,
        "peak_memory_gib": peak_memory_gib(),
        **ranks.fields,
        **evaluated,
        **training.labels,
    }
    # Inside a round of local updates no gate can die, which is nothing to be alarmed by.
    is_between = training.rounds is not None and training.rounds.is_open
    place = stage.phases.place(step_of_stage) if stage.is_pruning(step_of_stage) and not is_between else None
    found = training.alarms.of_line({"step": done, "phase": phase, **fields}, place)
    fields["alarms"] = (training.alarmed + raise_alarms(job, found)) or None
    training.alarmed = []
    training.directory.metrics(done, phase, fields)
    if phase != DENSE:
        training.directory.ranks(done, ranks.ranks, training.labels)
    counts = phase == FINETUNE or (job.plan.is_path and phase != DENSE)
    if evaluated and counts and training.patience.is_exhausted_by(evaluated["eval_loss"]):
        training.has_ended = True
        patience = job.config.evaluation.early_stopping_patience
        say(job.world, f"stopping after step {done}: {patience} evaluation(s) in a row brought no lower dev loss")


def raise_alarms(job: Job, sentences: list[str]) -> list[str]:
    """Say them; the same sentences."""
    for sentence in sentences:
        say(job.world, f"warning: {sentence}")
    return sentences


def is_due(interval: int | None, done: int) -> bool:
    """Whether something that happens every `interval` steps happens after `done` steps; None is never."""
    return interval is not None and done % interval == 0


def evaluation_due(job: Job, done: int) -> bool:
    """Whether the dev loss is measured after `done` steps."""
    return job.data.dev is not None and is_due(job.config.evaluation.eval_steps, done)


def skipped_steps(training: Training) -> int:
    """Of the run; with local updates by the replica that skipped most (collective)."""
    own = training.tally.skipped_steps
    if training.rounds is None:
        return own
    return max(found for (found,) in gather_integers([own], training.engine.device))


def dev_loss(job: Job, model: nn.Module) -> float:
    """The loss of `model` over all dev rows (collective)."""
    assert job.data.dev is not None
    return loss_over(job, model, job.data.dev)


def measure(training: Training) -> float:
    """The dev loss of the adapter as it is: inside a round of local updates, of the replicas' slot-wise mean.  The
    adapter is kept if it is the best so far (collective)."""
    rounds, engine = training.rounds, training.engine
    with contextlib.nullcontext() if rounds is None else rounds.averaged(engine):
        loss = dev_loss(training.job, engine.model)
        if keeps_best(training) and training.patience.is_better(loss):
            masters = engine.masters()
            training.best = Best(training.done, loss, masters if training.job.world.is_main else {})
    training.measured = training.done
    return loss


def keeps_best(training: Training) -> bool:
    """Only once ranks are what they will be: before, the dev loss rises because there are fewer of them."""
    return training.patience.counts and training.phase == FINETUNE


def final_masters(training: Training) -> Mapping[str, Tensor]:
    """What is exported: the adapter of the last step, or of the best evaluation where these are kept (collective)."""
    if keeps_best(training) and training.measured != training.done:
        measure(training)
    best = training.best
    if best is None:
        return training.engine.masters()
    if best.step != training.done:
        say(
            training.job.world,
            f"the adapter is that of step {best.step}, which has the lowest dev loss of the finetune phase "
            f"({best.eval_loss:.4f})",
        )
    return best.masters


def loss_over(job: Job, model: nn.Module, rows: TokenDataset) -> float:
    """The loss of `model` over all `rows` (collective)."""
    result = evaluate(
        model,
        rows,
        job.inputs.batch,
        batch_size=job.config.evaluation.per_device_eval_batch_size,
        world=job.world,
        device=job.accelerator.device,
        before_batch=job.heed_stop,
    )
    return result.loss


def current_ranks(training: Training) -> pipeline.RankReport:
    """Ranks by the gates as they are, or as the replicas agreed on them last (collective)."""
    engine, rounds = training.engine, training.rounds
    return pipeline.rank_report(adapters(engine.module), engine.gates() if rounds is None else rounds.gates)


def save_checkpoint(training: Training, unlogged: Mapping[str, float] | None = None) -> None:
    """Write the canonical state of the run as it is (collective; the main process writes).

    `unlogged` is what the line of this step still needs where it has not been written.
    """
    job, engine, directory, step, best = training.job, training.engine, training.directory, training.done, training.best
    training.tally.pause_clock()
    moments, optimizer_steps = engine.optimizer_state()
    tensors = {**engine.masters(), **moments}
    state: dict[str, Any] = {
        "phase": training.phase,
        "stage": {"number": training.stage_number, "first": training.first, "has_ended": training.has_ended},
        "optimizer_steps": optimizer_steps,
        "tally": training.tally.state(),
        "steering": training.steering.state(),
        "alarms": {**training.alarms.state(), "waiting": training.alarmed},
        "patience": training.patience.state(),
        "best": None if best is None else {"step": best.step, "eval_loss": best.eval_loss},
        "unlogged": unlogged,
        "late_round": dict(training.late_round),
        "loss_scale": [engine.loss_scale.state()],
        "num_processes": job.world.num_processes,
        "data": job.fingerprint,
        "order": job.order.position(),
        "config": to_dict(job.config),
    }
    keep, rounds, num_replicas = job.config.output.save_total_limit, training.rounds, 0
    best_masters = None if best is None else best.masters
    if rounds is not None:
        own, index, num_replicas = tensors, rounds.replicas.index, rounds.replicas.num
        tensors = rounds.tensors()
        steps = gather_objects(optimizer_steps)
        state["optimizer_steps"] = [steps[members[0]] for members in rounds.replicas.members]
        scales = gather_integers(engine.loss_scale.state(), engine.device)
        state["loss_scale"] = [scales[members[0]] for members in rounds.replicas.members]
        state["rounds"] = rounds.state()
        on_main(lambda: checkpoint.begin_replicas(directory.path, step), job.world)
        is_lead = rounds.replicas.is_lead
        on_every(lambda: checkpoint.save_replica(directory.path, step, index, own) if is_lead else None)
    directory.checkpoint = on_main(
        lambda: checkpoint.save(directory.path, step, tensors, state, keep, num_replicas, best_masters),
        job.world,
    )
    directory.step = step
    directory.status("running", phase=training.phase)
    directory.report(to_dict(job.config))


def cut_adapter(
    training: Training, model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Cut:
    """Cut `model` as the config says, and say what became of it (collective)."""
    job = training.job
    sora, budgets = job.config.sora, job.plan.budgets
    had_gates = any(layer.gate is not None for layer in adapters(model).values())
    cut = pipeline.cut_by_consensus(
        model,
        masters,
        consensus=sora.consensus,
        budgets=budgets,
        dtype=DTYPES[sora.dtype] if dtype is None else dtype,
        world=job.world,
        device=job.accelerator.device,
        replicas=job.replicas if had_gates and not training.agrees else None,
    )
    if had_gates:
        if cut.spread is not None:
            say(job.world, f"merging replicas of which the farthest is {cut.spread:.1%} of ΔW from their mean")
        say(
            job.world,
            f"consensus ({sora.consensus}): mean rank {cut.ranks.mean_rank:.2f}, {cut.ranks.kept_params:,} parameters, "
            f"{cut.dropped_share:.1%} of ΔW's energy dropped",
        )
        training.alarmed += raise_alarms(job, training.alarms.of_cut(cut.ranks.ranks, cut.shortfall))
    return cut
