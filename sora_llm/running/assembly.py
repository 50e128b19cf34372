"""Assembles a run's model, adapters and engine: fresh, resumed, rebuilt after a change, cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sora_llm import pipeline
from sora_llm.backbone import load_backbone
from sora_llm.base_files import base_digest
from sora_llm.base_spec import DTYPES, computes_in_float16
from sora_llm.compiled import CompiledBlocks
from sora_llm.distributed.collectives import on_every
from sora_llm.distributed.engine import Engine
from sora_llm.head_loss import frozen_head, try_head
from sora_llm.inject import adapters, init_from_lora, inject_sora
from sora_llm.local_updates import OuterOptimizer
from sora_llm.loss_scale import LossScale
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.pipeline import Cut
from sora_llm.running.alarms import Alarms
from sora_llm.running.early_stopping import EarlyStopping
from sora_llm.running.inputs import start_lora
from sora_llm.running.job import Job
from sora_llm.running.metrics import say_alarms
from sora_llm.running.optimizer_step import Tally, forget_peak
from sora_llm.running.packing_check import check_packing
from sora_llm.running.processes import refuse_differing
from sora_llm.running.rounds import Rounds
from sora_llm.running.routing_check import check_routing
from sora_llm.running.rundir import RunDirectory
from sora_llm.running.snapshot import read_into, refuse_other_base, restore_training
from sora_llm.running.start import StartPoint
from sora_llm.running.training import Training, make_controller
from sora_llm.running.unpack import target_modules


def load_model(job: Job) -> nn.Module:
    """The frozen backbone on this process's device."""
    spec, device, data = job.inputs.backbone, job.accelerator.device, job.config.data
    model = load_backbone(
        spec,
        device,
        gradient_checkpointing=job.config.train.gradient_checkpointing,
        warn=lambda text: job.say(f"warning: {text}"),
    )
    if (head := frozen_head(model)) is not None:
        try_head(model, head)
    if data.sample_packing:
        check_packing(model, spec.attn_implementation, device, is_8bit=spec.load_in_8bit)
    return model


def load_and_inject(job: Job, directory: RunDirectory, start: StartPoint) -> Training:
    """The frozen backbone with fresh or resumed adapters, under its engine (collective).

    Raises:
        UserError: weights that differ between processes, or from those that the checkpoint was trained on.
    """
    sora = job.config.sora
    model = on_every(lambda: load_model(job))
    digest = on_every(lambda: base_digest(job.inputs.backbone))
    refuse_differing("model.name_or_path", digest)
    if start.folder is not None and start.state is not None:
        refuse_other_base(start.state, start.folder, digest)
    torch.manual_seed(job.config.train.seed)
    inject_sora(model, sora.r, sora.lora_alpha, sora.lora_dropout, target_modules(job.config), DTYPES[sora.dtype])
    on_every(lambda: check_routing(model) if job.num_averaging > 1 else None)  # replicas may differ in size
    full_params = pipeline.full_params(adapters(model))
    saved = None
    if start.folder is not None and start.state is not None:
        saved = read_into(model, job, start.folder, start.state)
    elif job.config.model.adapter is not None:
        on_every(lambda: warm_start(job, model, digest))
    engine = make_engine(job, model)  # after the module has its values: ZeRO copies its masters from there
    training = Training(
        job,
        directory,
        engine,
        Tally.start(engine.device),
        make_controller(job, 0),
        Alarms(job.plan.budgets, full_params),
        EarlyStopping(job.config.evaluation.early_stopping_patience),
        make_rounds(job),
        full_params=full_params,
        base_digest=digest,
    )
    if saved is not None:
        restore_training(training, saved)
    elif training.rounds is not None:
        training.rounds.begin(engine)
    return training


def warm_start(job: Job, model: nn.Module, digest: str | None) -> None:
    """Initialise the adapters from the saved one; warn if it was trained on weights other than those of this
    `base_digest`."""
    lora, spec = start_lora(job.config), job.inputs.backbone
    init_from_lora(model, lora.factors, lora.scaling)
    trained_on = lora.certificate.base_digest
    if None not in (digest, trained_on) and digest != trained_on:
        job.say(
            f"warning: model.adapter was trained on different weights than those of {spec.name_or_path} (quantised "
            "differently, or another model): it does not start as the function it was"
        )


def make_engine(job: Job, model: nn.Module, loss_scale: LossScale | None = None) -> Engine:
    """`model` and a fresh optimizer under the run's strategy, with the loss scale of the previous engine, if there was
    one (collective).  Peak memory is measured from here."""
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
    optimizer = ProxAdamW(groups, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon)
    if loss_scale is None:
        loss_scale = LossScale(computes_in_float16(job.inputs.backbone))
    engine = Engine(
        job.accelerator,
        model,
        optimizer,
        job.plan.strategy,
        settings.max_grad_norm,
        job.replicas,
        loss_scale,
        CompiledBlocks(model) if settings.torch_compile else None,
    )
    forget_peak(engine.device)
    return engine


def renew_engine(
    training: Training, model: nn.Module, masters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Continue with a fresh optimizer, in a new round, from `masters` that all processes hold (collective)."""
    training.engine = make_engine(training.job, model, training.engine.loss_scale)
    training.engine.load(masters, state, 0)
    if training.rounds is not None:
        training.rounds.begin(training.engine)


def make_rounds(job: Job) -> Rounds | None:
    """The rounds of local updates, not begun; None if all processes step together."""
    if job.replicas is None:
        return None
    settings = job.config.distributed
    return Rounds(job.replicas, OuterOptimizer(settings.outer_learning_rate, settings.outer_momentum))


def cut_adapter(
    training: Training, model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Cut:
    """Cut `model` as the config says, and log the result (collective)."""
    job = training.job
    sora, budgets = job.config.sora, job.plan.budgets
    had_gates = any(layer.gate is not None for layer in adapters(model).values())
    cut = pipeline.cut_by_consensus(
        model,
        masters,
        consensus=sora.consensus,
        budgets=budgets,
        dtype=DTYPES[sora.dtype] if dtype is None else dtype,
        device=job.accelerator.device,
        replicas=job.replicas if had_gates and not training.agrees else None,
    )
    if cut.report is not None:
        if cut.spread is not None:
            job.say(f"merging replicas of which the farthest is {cut.spread:.1%} of ΔW from their mean")
        job.say(
            f"consensus ({sora.consensus}): mean rank {cut.ranks.mean_rank:.2f}, {cut.ranks.kept_params:,} parameters, "
            f"{cut.report.dropped_share:.1%} of ΔW's energy dropped",
        )
        say_alarms(job, training.alarms.of_cut(cut.ranks.ranks, cut.report.shortfall))
    return cut
