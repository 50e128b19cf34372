"""Adapters: what a run directory, a checkpoint or a LoRA folder holds, and whether several belong together."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from sora_llm import checkpoint
from sora_llm.backbone import BackboneSpec, dtype_name, load_config
from sora_llm.config import Config
from sora_llm.config import load_config as load_run_config
from sora_llm.consensus import Factors, PlainFactors, Scaling, empty_factors, kept_ranks, scaling_of, shapes_of
from sora_llm.errors import UserError
from sora_llm.inject import check_shape, target_linears
from sora_llm.inputs import backbone_spec, target_modules
from sora_llm.lora_files import CONFIG, is_same_base, read_lora
from sora_llm.merge import Replica
from sora_llm.sora import fold


@dataclass(frozen=True)
class Source:
    """An adapter: its factors by module, its targets (a pruned one has no factors), what it was trained on.

    `selector` chooses the targets on the base (of a checkpoint: one that was cut does not name what it lost), `spec` is
    how its base was loaded where that is known, `folder` where its tokenizer files are, if it has any, `config` that of
    the run it comes from.
    """

    name: str
    base: str
    revision: str | None
    factors: Factors
    scaling: Scaling
    targets: frozenset[str]
    selector: str | list[str] | None = None
    spec: BackboneSpec | None = None
    data: tuple[str, ...] = ()
    folder: Path | None = None
    config: Config | None = None

    def on(self, bare_model: nn.Module) -> Source:
        """With all targets that it has on this base."""
        if self.selector is None:
            return self
        return replace(self, targets=self.targets | target_linears(bare_model, self.selector).keys())

    @property
    def ranks(self) -> dict[str, int]:
        """{module: live slots}."""
        slots = {name: A.shape[0] for name, (A, _, _) in self.factors.items()}
        gated = kept_ranks({name: gate for name, (_, _, gate) in self.factors.items() if gate is not None})
        return {name: gated.get(name, slots.get(name, 0)) for name in sorted(self.targets)}


# ------------------------------------------------------------------------------------------------------------ reading


def read_source(folder: Path) -> Source:
    """The adapter that a path means.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; a source is a run directory, a checkpoint or a LoRA folder")
    if (folder / CONFIG).is_file():
        return _of_lora(folder)
    if (folder / checkpoint.COMPLETE).is_file() or (folder / checkpoint.STATE).is_file():
        return _of_checkpoint(folder)
    if (folder / "config.yaml").is_file():
        if not (folder / "adapter" / CONFIG).is_file():
            raise UserError(
                f"{folder} has no adapter yet; start its command again to let it finish, or name one of its "
                f"checkpoints ({folder / 'checkpoints'})"
            )
        return of_run(folder, folder / "adapter")
    raise UserError(
        f"{folder} is no run directory (config.yaml), checkpoint ({checkpoint.COMPLETE}) or LoRA ({CONFIG})"
    )


def _of_lora(folder: Path) -> Source:
    lora = read_lora(folder)
    return Source(str(folder), lora.base_model, lora.revision, lora.factors, lora.scaling, lora.targets, folder=folder)


def of_run(run_dir: Path, adapter: Path) -> Source:
    """One of the adapters of a run: its last one, or a stage of its path."""
    config, lora = load_run_config(run_dir / "config.yaml"), read_lora(adapter)
    return Source(
        str(run_dir),
        config.model.name_or_path,
        config.model.revision,
        lora.factors,
        lora.scaling,
        lora.targets,
        spec=backbone_spec(config, "none"),
        data=_data(config),
        folder=adapter,
        config=config,
    )


def checkpoint_config(folder: Path) -> Config:
    """The config of the run that saved a checkpoint.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or of another version.
    """
    state = checkpoint.read_state(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:  # JSON is YAML, and only config.py reads configs
        json.dump(state["config"], file)
        file.flush()
        return load_run_config(file.name)


def _of_checkpoint(folder: Path) -> Source:
    config = checkpoint_config(folder)
    tensors = checkpoint.read_tensors(folder)
    names = dict.fromkeys(key.rpartition(".lora_A")[0] for key in tensors if key.endswith(".lora_A"))
    factors = {n: (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"], tensors.get(f"{n}.gate")) for n in names}
    return Source(
        str(folder),
        config.model.name_or_path,
        config.model.revision,
        factors,
        config.sora.lora_alpha / config.sora.r,
        frozenset(names),
        selector=target_modules(config),
        spec=backbone_spec(config, "none"),
        data=_data(config),
        config=config,
    )


def _data(config: Config) -> tuple[str, ...]:
    return tuple(dataset.path for dataset in config.data.datasets)


# ------------------------------------------------------------------------------------------------- belonging together


def refuse_other_targets(sources: Sequence[Source], allow_missing: bool) -> None:
    """UserError if the sources adapt different modules, unless that is allowed."""
    first = sources[0]
    for source in sources[1:]:
        odd = sorted(source.targets ^ first.targets)
        if odd and not allow_missing:
            here, there = (first, source) if odd[0] in first.targets else (source, first)
            raise UserError(
                f"{here.name} adapts {odd[0]} and {there.name} does not ({len(odd)} modules differ); adapters of other "
                "targets can only be merged as if they were 0 there: --allow-missing"
            )


def base_of(
    sources: Sequence[Source], base: str | None, trust_remote_code: bool, option: str = "--base"
) -> BackboneSpec:
    """How to load the one base of all sources, or `base` in its place: as the first run did, or in its own dtype.

    `option` is what the command calls `base`.

    Raises:
        UserError: they name different bases, or none.
    """
    known = next((source for source in sources if source.spec is not None), None)
    revision = None
    if base is None:
        named = [source for source in sources if source.base]
        refuse_other_bases(named, option)
        base, revision = (known or named[0]).base, (known or named[0]).revision
    spec = BackboneSpec(base) if known is None or known.spec is None else known.spec
    spec = replace(spec, name_or_path=base, revision=revision, trust_remote_code=trust_remote_code)
    return spec if known else replace(spec, dtype=dtype_name(load_config(spec)))


def refuse_other_bases(named: Sequence[Source], option: str = "--base") -> None:
    """UserError unless all sources are of one base; `named` are those that say of which."""
    if not named:
        raise UserError(f"no source says which base it is of; name it with {option} MODEL")
    first = named[0]
    for other in named[1:]:
        if not is_same_base(first.base, other.base):
            raise UserError(
                f"{first.name} is of the base {first.base} and {other.name} of {other.base}; only adapters of one base "
                f"can be merged ({option} MODEL, if these are copies of one model)"
            )
        if (first.revision or "main") != (other.revision or "main") and not Path(first.base).expanduser().is_dir():
            raise UserError(
                f"{first.name} is of revision {first.revision or 'main'} of {first.base} and {other.name} of "
                f"{other.revision or 'main'}; only adapters of one base can be merged ({option} MODEL, if equal)"
            )


def shapes_in(spec: BackboneSpec, bare_model: nn.Module, sources: Sequence[Source]) -> dict[str, tuple[int, int]]:
    """{module: (I, O)} of everything that a source adapts, from the base's config alone.

    Raises:
        UserError: a source that does not fit the base.
    """
    linears = target_linears(bare_model)
    shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    for source in sources:
        missing = sorted(source.targets - shapes.keys())
        if missing:
            raise UserError(
                f"{source.name} adapts {missing[0]}, which is no layer of {spec.name_or_path} that can be merged "
                "(linear ones, but for the output head)"
            )
        for name, found in shapes_of(source.factors).items():
            check_shape(source.name, name, found, shapes[name])
    everywhere = frozenset().union(*(source.targets for source in sources))
    return {name: shape for name, shape in shapes.items() if name in everywhere}


def plain_factors(source: Source, shapes: Mapping[str, tuple[int, int]]) -> PlainFactors:
    """Gates and scale folded in, modules that the source lacks with rank 0; in the order of `shapes`."""
    plain = {}
    for name, (num_in, num_out) in shapes.items():
        if name in source.factors:
            plain[name] = fold(*source.factors[name], scaling_of(source.scaling, name))
        else:
            plain[name] = empty_factors(num_in, num_out)
    return plain


def replica(source: Source, weight: float, shapes: Mapping[str, tuple[int, int]]) -> Replica:
    """With empty factors for the modules that the source lacks: what is pruned everywhere is a target all the same."""
    factors, scaling = {}, {}
    for name, (num_in, num_out) in shapes.items():
        factors[name] = source.factors.get(name, (*empty_factors(num_in, num_out), None))
        scaling[name] = scaling_of(source.scaling, name) if name in source.factors else 1.0
    return Replica(weight, factors, scaling)
