"""Reading adapters from runs, checkpoints and LoRA folders, and checking that several can be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from sora_llm import checkpoint
from sora_llm.artifacts.certificate import Certificate
from sora_llm.artifacts.lora_files import is_same_base, read_lora
from sora_llm.backbone import load_tokenizer, spec_from_files
from sora_llm.base_files import base_digest, has_tokenizer, tokenizer_files_in
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.path_arguments import ResolvedPath, resolve_path
from sora_llm.config import Config
from sora_llm.errors import UserError
from sora_llm.factors import (
    Factors,
    PlainFactors,
    Scaling,
    empty_factors,
    kept_ranks,
    scaling_of,
    shapes_of,
)
from sora_llm.inject import check_shape, layer_shapes
from sora_llm.merge import WeightedAdapter
from sora_llm.prompt_format import exported_template, has_conversations
from sora_llm.run_files import ADAPTER_CONFIG, CHAT_TEMPLATE
from sora_llm.running.data_lineage import lineage_for_certificate
from sora_llm.running.unpack import backbone_spec, target_modules
from sora_llm.sora import fold
from sora_llm.targets import linear_layers, target_linears
from sora_llm.terminal import warn


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter: its factors by module, its targets (a pruned one has no factors), its training data.

    `selector` chooses the targets on the base (for a checkpoint, since one that was cut does not name what it lost),
    `spec` is how its base was loaded, if known, `folder` is where its tokenizer files are, if it has any, and `config`
    is that of the run it comes from.
    """

    name: str
    base: str
    revision: str | None
    factors: Factors
    scaling: Scaling
    targets: frozenset[str]
    selector: str | list[str] | None = None
    spec: BackboneSpec | None = None
    data: Sequence[Mapping[str, str]] = ()
    """Its training data, as a certificate lists it."""
    folder: Path | None = None
    config: Config | None = None
    certificate: Certificate = field(default_factory=Certificate)
    """The one in its folder; empty for a checkpoint."""
    base_digest: str | None = None
    """The digest of the weights that it was trained on, if known."""

    def on(self, skeleton: nn.Module) -> SavedAdapter:
        """The same adapter with all targets that it has on this base."""
        if self.selector is None:
            return self
        return replace(self, targets=self.targets | target_linears(skeleton, self.selector).keys())

    @property
    def may_lack_targets(self) -> bool:
        """Whether its files may not give the size of every target: a pruned one has no factors there."""
        is_cut = self.selector is not None and all(gate is None for _, _, gate in self.factors.values())
        return is_cut or not self.targets <= self.factors.keys()

    @property
    def ranks(self) -> dict[str, int]:
        """{module: live slots}."""
        slots = {name: A.shape[0] for name, (A, _, _) in self.factors.items()}
        gated = kept_ranks({name: gate for name, (_, _, gate) in self.factors.items() if gate is not None})
        return {name: gated.get(name, slots.get(name, 0)) for name in sorted(self.targets)}


# ------------------------------------------------------------------------------------------------------------ reading


def read_source(path: str | Path) -> SavedAdapter:
    """The adapter that a path names.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return source_of(resolve_path(path))


def source_of(place: ResolvedPath) -> SavedAdapter:
    """The adapter of a place; UserError if it has none, or one that cannot be read."""
    folder = place.with_adapter()
    if place.config is not None and place.is_checkpoint:
        return _of_checkpoint(place.name, folder, place.config)
    lora, config = read_lora(folder), place.config
    source = SavedAdapter(
        place.name,
        lora.base_model,
        lora.revision,
        lora.factors,
        lora.scaling,
        lora.targets,
        spec=BackboneSpec(lora.base_model, lora.revision).loaded_as(lora.certificate.base_loading),
        data=lineage_for_certificate(None, lora.certificate),
        folder=folder,
        certificate=lora.certificate,
        base_digest=lora.certificate.base_digest,
    )
    return source if config is None else _of_run(source, config)


def _of_run(source: SavedAdapter, config: Config) -> SavedAdapter:
    """The adapter with the facts that its run's config gives."""
    return replace(
        source,
        base=config.model.name_or_path,
        revision=config.model.revision,
        spec=backbone_spec(config, "none"),
        data=lineage_for_certificate(config, source.certificate),
        config=config,
    )


def _of_checkpoint(name: str, folder: Path, config: Config) -> SavedAdapter:
    tensors = checkpoint.read_tensors(folder)
    modules = dict.fromkeys(key.rpartition(".lora_A")[0] for key in tensors if key.endswith(".lora_A"))
    factors = {m: (tensors[f"{m}.lora_A"], tensors[f"{m}.lora_B"], tensors.get(f"{m}.gate")) for m in modules}
    for module, (A, B, gate) in factors.items():
        live = torch.ones(len(A), dtype=torch.bool) if gate is None else gate != 0
        if not all(bool(t.isfinite().all()) for t in (A[live], B[:, live], live if gate is None else gate)):
            raise UserError(f"{name} holds values of {module} that are not finite; name an earlier checkpoint")
    scaling = config.sora.lora_alpha / config.sora.r
    source = SavedAdapter(
        name,
        "",
        None,
        factors,
        scaling,
        frozenset(modules),
        selector=target_modules(config),
        base_digest=recorded_digest(folder),
    )
    return _of_run(source, config)


def recorded_digest(folder: Path) -> str | None:
    """The `base_digest` that a checkpoint, or the certificate of a LoRA, records; None if there is none."""
    if (folder / ADAPTER_CONFIG).is_file():
        return Certificate.read(folder).base_digest
    return checkpoint.read_state(folder).get("base")


def own_tokenizer(source: SavedAdapter, spec: BackboneSpec) -> tuple[list[Path], str | None]:
    """The tokenizer files that an adapter brings ([] without a vocabulary: they are the base's), and its chat template:
    the one stored next to it or else, if it brings no tokenizer, the one that its run trained with.  A run that
    rendered no rows has none: a template next to it belongs to the base's tokenizer.

    Raises:
        UserError: a template that cannot be read.
    """
    files: list[Path] = []
    if source.folder is not None:
        template = source.folder / CHAT_TEMPLATE
        if has_tokenizer(source.folder):
            files = tokenizer_files_in(source.folder)
        if source.config is not None and not _used_template(source):
            return files, None
        files = [file for file in files if file != template]
        try:
            if template.is_file():
                return files, template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{template} cannot be read: {error}") from None
    if source.config is None or files:
        return files, None
    return files, exported_template(source.config, load_tokenizer(spec))


def _used_template(source: SavedAdapter) -> bool:
    """Whether the adapter's run is known to have rendered rows with a template."""
    return source.config is not None and has_conversations(source.config.data.datasets)


@dataclass(frozen=True)
class SharedTokenizer:
    """The tokenizer of several sources: `owner` is the one whose template it is (None: none brings one), `others` are
    those that were trained with another one."""

    files: list[Path]
    template: str | None
    owner: str | None
    others: list[str]


def shared_tokenizer(sources: Sequence[SavedAdapter], spec: BackboneSpec) -> SharedTokenizer:
    """Files and template of the first source that brings a template, or else of the first one that brings files.

    Raises:
        UserError: a template that cannot be read.
    """
    brought = [own_tokenizer(source, spec) for source in sources]
    files = next((files for files, _ in brought if files), [])
    owner = next((index for index, (_, template) in enumerate(brought) if template is not None), None)
    if owner is None:
        return SharedTokenizer(files, None, None, [])
    own_files, template = brought[owner]
    others = [
        source.name
        for source, (_, other) in zip(sources, brought, strict=True)
        if other != template and (other is not None or _used_template(source))  # else it used none, or an unknown one
    ]
    return SharedTokenizer(own_files or files, template, sources[owner].name, others)


# ------------------------------------------------------------------------------------------------- belonging together


def refuse_other_targets(sources: Sequence[SavedAdapter], allow_missing: bool) -> None:
    """UserError if the sources adapt different modules, unless that is allowed."""
    first = sources[0]
    for source in sources[1:]:
        odd = sorted(source.targets ^ first.targets)
        if odd and not allow_missing:
            here, there = (first, source) if odd[0] in first.targets else (source, first)
            raise UserError(
                f"{here.name} adapts {odd[0]} and {there.name} does not ({len(odd)} modules differ); --allow-missing "
                "treats the missing ones as 0"
            )


def base_of(
    sources: Sequence[SavedAdapter], base: str | None, trust_remote_code: bool, option: str = "--base"
) -> BackboneSpec:
    """How to load the one base of all sources, or `base` in its place: as the first run did, or in its own dtype.

    `option` is the command's name for `base`.

    Raises:
        UserError: they name different bases, or none.
    """
    known = next((source for source in sources if source.spec is not None), None)
    revision = None
    if base is None:
        named = [source for source in sources if source.base]
        refuse_other_bases(named, option)
        owner = known if known is not None and known.base else named[0]
        base, revision = owner.base, owner.revision
    spec = BackboneSpec(base) if known is None or known.spec is None else known.spec
    spec = replace(
        spec, name_or_path=base, revision=revision, trust_remote_code=trust_remote_code or spec.trust_remote_code
    )
    return spec if known else spec_from_files(spec)


def of_other_forms(sources: Sequence[SavedAdapter], spec: BackboneSpec) -> list[str]:
    """The names of the sources known to have been trained on a form of the base other than the one `spec` loads."""
    return [source.name for source in sources if source.spec is not None and source.spec.form != spec.form]


def refuse_other_weights(
    sources: Sequence[SavedAdapter], spec: BackboneSpec, base: str | None, option: str = "--base"
) -> None:
    """UserError if the base's files now hold other weights than a source was trained on; only a warning if `base`, the
    value of the command's `option`, names the base explicitly."""
    others = beside_other_weights({source.name: source.base_digest for source in sources}, spec)
    if others and base is None:
        raise UserError(
            f"the weights of {spec.name_or_path} are not those that {others[0]} was trained on; restore them, or "
            f"name the base with {option} MODEL"
        )
    if others:
        warn_of_other_weights(others[0], spec)


def beside_other_weights(recorded: Mapping[str, str | None], spec: BackboneSpec) -> list[str]:
    """The names of the adapters that are known, by their `base_digest`, to have been trained on other weights than the
    base's files hold; these are read once, and only if a digest is known."""
    known = {name: digest for name, digest in recorded.items() if digest is not None}
    now = base_digest(spec) if known else None
    return [name for name, digest in known.items() if now not in (None, digest)]


def warn_of_other_weights(name: str, spec: BackboneSpec) -> None:
    """Warn that the base's weights differ from those the adapter `name` was trained on."""
    warn(
        f"the weights of {spec.name_or_path} are not those that {name} was trained on (quantised differently, or "
        "another model)"
    )


def shared_digest(sources: Sequence[SavedAdapter], spec: BackboneSpec) -> str | None:
    """The `base_digest` of an adapter merged from several: that of their training, if all those that record one agree,
    or else that of the base as it is now."""
    known = {source.base_digest for source in sources} - {None}
    return known.pop() if len(known) == 1 else base_digest(spec)


def refuse_other_bases(named: Sequence[SavedAdapter], option: str = "--base") -> None:
    """UserError unless all sources are for one base; `named` are those that name theirs."""
    if not named:
        raise UserError(f"no source names its base; name it with {option} MODEL")
    first = named[0]
    for other in named[1:]:
        one, another = (BackboneSpec(source.base, source.revision) for source in (first, other))
        if not is_one_base(one, another):
            raise UserError(
                f"{first.name} is for the base {base_name(one)}, {other.name} for {base_name(another)}; only adapters "
                f"for one base can be merged ({option} MODEL, if these are copies of one model)"
            )


def is_one_base(one: BackboneSpec, other: BackboneSpec) -> bool:
    """Whether two specs load the same weights: the same folder, or the same revision of a repository on the hub."""
    if not is_same_base(one.name_or_path, other.name_or_path):
        return False
    return one.folder.is_dir() or (one.revision or "main") == (other.revision or "main")


def base_name(spec: BackboneSpec) -> str:
    """The base's name, with its revision if it is from the hub."""
    return spec.name_or_path if spec.folder.is_dir() else f"{spec.name_or_path} (revision {spec.revision or 'main'})"


def shapes_in(spec: BackboneSpec, skeleton: nn.Module, sources: Sequence[SavedAdapter]) -> dict[str, tuple[int, int]]:
    """{module: (I, O)} of everything that a source adapts, from the base's config alone.

    Raises:
        UserError: a source that does not fit the base.
    """
    linears = linear_layers(skeleton)
    shapes = layer_shapes(linears)
    for source in sources:
        missing = sorted(source.targets - shapes.keys())
        if missing:
            raise UserError(
                f"{source.name} adapts {missing[0]}, which is not a linear layer of {spec.name_or_path} (the output "
                "head does not count)"
            )
        for name, found in shapes_of(source.factors).items():
            check_shape(source.name, name, found, shapes[name])
    everywhere = frozenset().union(*(source.targets for source in sources))
    return {name: shape for name, shape in shapes.items() if name in everywhere}


def plain_factors(source: SavedAdapter, shapes: Mapping[str, tuple[int, int]]) -> PlainFactors:
    """The factors with gates and scale folded in, of rank 0 for missing modules; in the order of `shapes`."""
    plain = {}
    for name, (num_in, num_out) in shapes.items():
        if name in source.factors:
            plain[name] = fold(*source.factors[name], scaling_of(source.scaling, name))
        else:
            plain[name] = empty_factors(num_in, num_out)
    return plain


def replica(source: SavedAdapter, weight: float, shapes: Mapping[str, tuple[int, int]]) -> WeightedAdapter:
    """The source with empty factors for modules that it lacks: a module pruned everywhere is still a target."""
    factors, scaling = {}, {}
    for name, (num_in, num_out) in shapes.items():
        factors[name] = source.factors.get(name, (*empty_factors(num_in, num_out), None))
        scaling[name] = scaling_of(source.scaling, name) if name in source.factors else 1.0
    return WeightedAdapter(weight, factors, scaling)
