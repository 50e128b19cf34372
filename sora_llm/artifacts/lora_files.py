"""Any plain LoRA on disk, PEFT's or ours, as factors and scales: read only from its files, without peft or a base.

PEFT applies to a module  ΔW = scale · B A,  scale = alpha / r, or alpha / √r with `use_rslora`; `rank_pattern` and
`alpha_pattern` are regular expressions that the end of a module's name must match, and the first match wins.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sora_llm.artifacts.certificate import Certificate
from sora_llm.errors import UserError
from sora_llm.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

BASE = "base_model_name_or_path"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>[AB])\.weight")
OTHER_METHODS = {  # options of adapter_config.json that change the product of the factors, or the base
    "use_dora": "DoRA rescales the columns of the sum",
    "fan_in_fan_out": "its layers hold their weights transposed",
    "lora_bias": "it has biases of its own",
    "layer_replication": "it repeats layers of the base",
    "modules_to_save": "it brings whole layers of its own",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it has embeddings of its own",
    "alora_invocation_tokens": "it acts behind certain tokens only",
    "arrow_config": "it chooses among adapters token by token",
    "use_qalora": "its A reads groups of inputs",
    "use_bdlora": "its factors are blocks",
    "kasa_config": "it cuts the base's own singular values",
    "monteclora_config": "its factors are drawn at random",
}
_HARMLESS = {  # options that a plain LoRA may have, whatever their value
    *("task_type", "peft_type", "peft_version", "auto_mapping", BASE, "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
T = TypeVar("T")
_LARGEST = torch.finfo(torch.float32).max
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also change W


def tensor_name(module: str, kind: str) -> str:
    """PEFT's name of a factor, `kind` "A" or "B"."""
    return f"base_model.model.{module}.lora_{kind}.weight"


def by_module(tensors: Mapping[str, T], folder: Path) -> dict[str, dict[str, T]]:
    """{module: {"A": …, "B": …}} of what is given by `tensor_name`; modules that have only one factor have one entry.

    Raises:
        UserError: a name that is none of a factor of a linear layer; `folder` is where it was found.
    """
    pairs: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise UserError(f"{folder} is not a plain LoRA of linear layers: it contains {name}")
        pairs.setdefault(found["module"], {})[found["kind"]] = tensor
    return pairs


@dataclass(frozen=True)
class ScaleRules:
    """PEFT's rules for the rank and the scale of each module, from an adapter_config.json."""

    r: int
    alpha: float
    ranks: Mapping[re.Pattern[str], float]
    alphas: Mapping[re.Pattern[str], float]
    uses_rslora: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ScaleRules:
        """Those of a config as it was read; KeyError, ValueError, TypeError, AttributeError or re.error if it has none
        that are valid."""
        r, alpha = int(config["r"]), float(config["lora_alpha"])
        ranks, alphas = (
            {re.compile(key): float(value) for key, value in (config.get(option) or {}).items()}
            for option in ("rank_pattern", "alpha_pattern")
        )
        return cls(r, alpha, ranks, alphas, bool(config.get("use_rslora")))

    def rank(self, module: str) -> float:
        """The rank of a module."""
        return _by_pattern(self.ranks, module, self.r)

    def scale(self, module: str) -> float:
        """The scale of a module's product."""
        return self._scale(_by_pattern(self.alphas, module, self.alpha), self.rank(module))

    @property
    def global_scale(self) -> float:
        """The scale of a module that no pattern names: of every module, in engines that read no patterns."""
        return self._scale(self.alpha, self.r)

    def _scale(self, alpha: float, rank: float) -> float:
        return alpha / (math.sqrt(rank) if self.uses_rslora else rank)


def _by_pattern(patterns: Mapping[re.Pattern[str], float], module: str, otherwise: float) -> float:
    """The value of the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern.pattern})$", module):
            return value
    return otherwise


@dataclass(frozen=True)
class LoraFiles:
    """A saved LoRA: {module: (A (R, I), B (O, R), None)} in float32, and the scale of each module's product.

    Slots that add nothing are left out.  `targets` are all modules that it was made for, including pruned ones missing
    from the files if the certificate names them; that is empty if there is none.
    """

    base_model: str
    revision: str | None
    factors: dict[str, tuple[Tensor, Tensor, None]]
    scaling: dict[str, float]
    targets: frozenset[str]
    certificate: Certificate


def read_lora(folder: Path, *, blank_up_to: int = 0) -> LoraFiles:
    """The LoRA in `folder`.

    Slots that add nothing yet but can learn (one factor is zero, as in every LoRA before its first step) are kept after
    the others, as long as the module has at most `blank_up_to` slots with them.

    Raises:
        UserError: no LoRA in safetensors, one that is more than a plain LoRA of linear layers, or files that contradict
            each other.
    """
    config = _read_config(folder)
    rules = ScaleRules.of(config)
    try:
        with (folder / ADAPTER_WEIGHTS).open("rb"):  # of an unreadable file, safetensors says that there is none
            tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        pickled = " (adapter_model.bin is a pickle and is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{folder} holds no {ADAPTER_WEIGHTS} that can be read{pickled}: {error}") from None
    pairs = by_module(tensors, folder)
    if not pairs:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} holds no factors")
    certificate = Certificate.read(folder)
    certificate.check_describes(folder)
    factors, scaling = {}, {}
    for name, pair in pairs.items():
        if not is_target(name, config):
            raise UserError(
                f"{folder} holds factors of {name}, which its {ADAPTER_CONFIG} leaves out, so PEFT would ignore them; "
                "fix that file"
            )
        A, B = _checked(pair, name, folder)
        rank = rules.rank(name)
        if A.shape[0] != rank:
            raise UserError(
                f"{folder}: {name} has {A.shape[0]} slots, {ADAPTER_CONFIG} says {rank}; the files do not match"
            )
        has_A, has_B = (A != 0).any(1), (B != 0).any(0)
        live, blank = (mask.nonzero()[:, 0] for mask in (has_A & has_B, has_A ^ has_B))
        kept = torch.cat([live, blank[: max(0, blank_up_to - len(live))]])
        factors[name] = (A[kept], B[:, kept], None)
        scaling[name] = rules.scale(name)
    return LoraFiles(
        config[BASE],
        config.get("revision"),
        factors,
        scaling,
        targets=frozenset(factors) | certificate.modules,
        certificate=certificate,
    )


def saved_base(folder: Path) -> str:
    """The base that the LoRA in `folder` names, "" if it names none; UserError as in `read_lora`."""
    base: str = _read_config(folder)[BASE]
    return base


def saved_revision(folder: Path) -> str | None:
    """The revision of the base; UserError as in `read_lora`."""
    revision: str | None = _read_config(folder).get("revision")
    return revision


def is_same_base(one: str, other: str) -> bool:
    """Whether two names refer to the same base: local folders by their real path, hub ids by their name."""
    return _place(one) == _place(other)


def _place(base: str) -> str:
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rules = ScaleRules.of(config)
        if min([rules.r, *rules.ranks.values()]) < 1:
            raise ValueError("a rank below 1")
        if not all(abs(alpha) <= _LARGEST for alpha in [rules.alpha, *rules.alphas.values()]):
            raise ValueError("a lora_alpha that is not finite in float32")
        _check_targets(config)
        config[BASE] = config.get(BASE) or ""
        if not isinstance(config[BASE], str) or not isinstance(config.get("revision"), str | None):
            raise TypeError("a base that is no name")
    except OSError as error:
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG} that can be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} is not the config of a LoRA ({error or type(error).__name__})"
        ) from None
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{folder} is a {config['peft_type']} adapter; only LoRA has factors that can be read here")
    more = next(more_than_lora(config), None)
    if more is not None:
        raise UserError(f"{folder} is more than a plain LoRA: {more}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OTHER_BASES):
        raise UserError(
            f"{folder} was initialised with {start}, which also changes the base, so its factors alone do not describe "
            "it; PEFT can convert most of these on saving (path_initial_model_for_weight_conversion)"
        )
    return config


def _check_targets(config: Mapping[str, Any]) -> None:
    """ValueError or re.error for targets or layers that neither `is_target` nor PEFT could compare with a name."""
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(option)
        if isinstance(value, str):
            re.compile(value)
        elif value is not None and not _is_list_of(str, value):
            raise ValueError(f"{option} is {value!r}, neither a pattern nor a list of names")
    layers = config.get("layers_to_transform")
    if not isinstance(layers, int | None) and not _is_list_of(int, layers):
        raise ValueError(f"layers_to_transform is {layers!r}, neither a number nor a list of numbers")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def more_than_lora(config: Mapping[str, Any]) -> Iterator[str]:
    """Features in an adapter_config.json beyond factors of linear layers, in words; none for a plain LoRA."""
    for option, value in config.items():
        is_set = value is not None if option.endswith("_config") else bool(value)
        if is_set and option not in _HARMLESS:
            yield f"{option} is set, {OTHER_METHODS.get(option, 'which is unknown here')}"
    if config.get("bias", "none") != "none":
        yield f"it trains biases (bias: {config['bias']})"


def _checked(pair: Mapping[str, Tensor], name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of one module."""
    if pair.keys() != {"A", "B"}:
        raise UserError(f"{folder}: {name} has only lora_{next(iter(pair))}; the file is incomplete")
    A, B = pair["A"].float(), pair["B"].float()
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise UserError(
            f"{folder}: factors of {name} have shapes {tuple(A.shape)}, {tuple(B.shape)}: no linear layer's"
        )
    for kind, tensor in (("A", A), ("B", B)):
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{folder}: lora_{kind} of {name} holds values that are not finite")
    return A, B


def is_target(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT puts an adapter on the module `name`."""

    def matches(targets: Any) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, name) is not None
        return name in targets or any(name.endswith(f".{target}") for target in targets)

    targets, excluded, layers = (config.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform"))
    if (targets and not matches(targets)) or (excluded and matches(excluded)):
        return False
    if layers is None or layers == [] or isinstance(targets, str) or name in (targets or ()):
        return True  # layers only apply to suffixes
    own = config.get("layers_pattern") or ()
    patterns = [rf"(?:^|.*?\.){pattern}" for pattern in ([own] if isinstance(own, str) else own)]
    # The first number in the name: later ones may belong to experts.
    found = (re.match(rf"{pattern}\.(?P<number>\d+)\.", name) for pattern in patterns or [r".*?\.[^.]*"])
    number = next((int(match["number"]) for match in found if match), None)
    return number is not None and number in ([layers] if isinstance(layers, int) else layers)


def check_lora(folder: Path) -> None:
    """UserError unless a plain LoRA's config and, if there is one, its certificate describe the weights next to them;
    these are not loaded."""
    _read_config(folder)
    Certificate.read(folder).check_describes(folder)
