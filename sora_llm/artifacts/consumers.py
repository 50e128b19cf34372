"""Which engines apply an adapter correctly: the scale that each would use and the shapes that it requires, computed
from the files alone by the rules in the engines' sources.

    vLLM ≤ 0.31, SGLang, TGI, LoRAX   one scale for all modules, lora_alpha / r
    PEFT, transformers, vLLM ≥ 0.32   alpha_pattern / rank_pattern if they name the module
    llama.cpp, Ollama                 alpha / (rank of the tensor), 1 if alpha is 0
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sora_llm.artifacts.gguf_lora import ALPHA_KEY, KINDS, TYPE_KEY, Architecture, GgufFile
from sora_llm.artifacts.lora_files import ScaleRules, by_module, is_target, more_than_lora
from sora_llm.errors import UserError
from sora_llm.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PEFT, TRANSFORMERS, VLLM, OLD_VLLM = "PEFT", "transformers", "vLLM ≥ 0.32", "vLLM ≤ 0.31"
SGLANG, TGI, LORAX, LLAMA_CPP, OLLAMA, MLX = "SGLang", "TGI", "LoRAX", "llama.cpp", "Ollama", "MLX-LM"
CONSUMERS = (PEFT, TRANSFORMERS, VLLM, OLD_VLLM, SGLANG, TGI, LORAX, LLAMA_CPP, OLLAMA, MLX)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank accepts."""


@dataclass(frozen=True)
class Verdict:
    """Whether an engine applies an adapter exactly: the first rule violated, "" if none, and how to serve it."""

    reason: str
    serve: str = ""

    @property
    def works(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class LoraFolder:
    """A PEFT folder as engines see it: its config and what that says by PEFT's rules, {module: (rows of A, columns of
    B)}, and the modules that engines look for: those of the same kinds in all layers of the base."""

    config: dict[str, Any]
    rules: ScaleRules
    ranks: dict[str, tuple[int, int]]
    targets: frozenset[str]

    @property
    def r(self) -> int:
        return self.rules.r

    @property
    def alpha(self) -> float:
        return self.rules.alpha

    @property
    def odd_rank(self) -> str | None:
        """A module whose rank is not r, None if there is none."""
        return next((name for name, found in self.ranks.items() if found != (self.r, self.r)), None)

    @property
    def missing(self) -> str | None:
        """A target without tensors, None if there is none."""
        return next(iter(sorted(self.targets - self.ranks.keys())), None)


def read_folder(folder: Path, targets: Collection[str] = ()) -> LoraFolder:
    """Config and shapes of the LoRA in `folder`; `targets` are modules that engines look for in addition to those with
    tensors.

    Raises:
        UserError: files that cannot be read.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        rules = ScaleRules.of(config)
        if rules.r < 1 or not math.isfinite(rules.alpha):
            raise ValueError(f"r is {config['r']} and lora_alpha {config['lora_alpha']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error, SafetensorError) as error:
        raise UserError(f"the adapter {folder} cannot be read: {error}") from None
    ranks = {
        name: (pair["A"][0] if "A" in pair else 0, pair["B"][1] if "B" in pair else 0)
        for name, pair in by_module(shapes, folder).items()
    }
    return LoraFolder(config, rules, ranks, frozenset(targets) | ranks.keys())


# -------------------------------------------------------------------------------------------------------- a folder


def verdicts_for_folder(
    lora: LoraFolder,
    scales: float | Mapping[str, float] = 1.0,
    base: str = "BASE",
    place: str = "path/to/this/folder",
    is_base_quantised: bool = False,
) -> dict[str, Verdict]:
    """{engine: verdict} of a PEFT folder whose correct scale is `scales` (1 in our exports); serve lines name `base`
    and `place`, and llama.cpp cannot convert the base's files if they are quantised."""
    wanted = {name: scales[name] if isinstance(scales, Mapping) else scales for name in lora.ranks}
    note, original = _for_converter(base, is_base_quantised)
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= lora.r), None)
    model, lora_path = shlex.quote(base), shlex.quote(place)
    vllm = f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules adapter={lora_path}"
    by_engine = {
        PEFT: (_peft(lora, wanted), f"PeftModel.from_pretrained(base, {json.dumps(place)})"),
        TRANSFORMERS: (_peft(lora, wanted), f"base.load_adapter({json.dumps(place)})"),
        VLLM: (_vllm(lora, wanted, reads_patterns=True), vllm),
        OLD_VLLM: (_vllm(lora, wanted, reads_patterns=False), vllm),
        SGLANG: (
            _sglang(lora, wanted),
            f"python -m sglang.launch_server --model-path {model} --enable-lora --lora-paths adapter={lora_path}",
        ),
        TGI: (
            _by_kind(lora, wanted),
            f"text-generation-launcher --model-id {model} --lora-adapters adapter={lora_path}",
        ),
        LORAX: (
            _by_kind(lora, wanted),
            f"lorax-launcher --model-id {model} --adapter-id {lora_path} --adapter-source local",
        ),
        LLAMA_CPP: (
            _converted(lora, wanted),
            f"{note}python convert_lora_to_gguf.py --base {original} {lora_path}",
        ),
        OLLAMA: (iter(["it takes GGUF files with llama.cpp's order of rows: export with --layout gguf"]), ""),
        MLX: (iter(["it reads a file format of its own, adapters.safetensors with lora_parameters"]), ""),
    }
    return {engine: _verdict(problems, serve) for engine, (problems, serve) in by_engine.items()}


def _for_converter(base: str, is_quantised: bool) -> tuple[str, str]:
    """(comment, quoted base) for llama.cpp's converters, which read only unquantised models."""
    if not is_quantised:
        return "", shlex.quote(base)
    return f"# ORIGINAL is the unquantised model that {base} was made from\n", "ORIGINAL"


def _verdict(problems: Iterator[str], serve: str) -> Verdict:
    reason = next(problems, "")
    return Verdict(reason, "" if reason else serve)


def _peft(lora: LoraFolder, wanted: Mapping[str, float]) -> Iterator[str]:
    """Patterns decide scale and rank; a tensor whose module is not named is silently dropped."""
    yield from _plain(lora)
    for name in lora.ranks:
        if not is_target(name, lora.config):
            yield f"target_modules leaves {name} out: its tensors would be dropped silently"
    yield from _ranks_by_pattern(lora)
    yield from _wrong_scale({name: lora.rules.scale(name) for name in lora.ranks}, wanted)


def _vllm(lora: LoraFolder, wanted: Mapping[str, float], *, reads_patterns: bool) -> Iterator[str]:
    yield from _plain(lora)
    if lora.r > VLLM_RANKS[-1]:
        yield f"r is {lora.r}, above its largest --max-lora-rank, {VLLM_RANKS[-1]}"
    for name, found in lora.ranks.items():
        if max(found) > lora.r:
            yield f"{name} has rank {max(found)}, more than r {lora.r}, which is what it allocates"
    own = {name: lora.rules.scale(name) if reads_patterns else lora.rules.global_scale for name in lora.ranks}
    yield from _wrong_scale(own, wanted)


def _sglang(lora: LoraFolder, wanted: Mapping[str, float]) -> Iterator[str]:
    """One rank and one scale; a projection must be in every layer or in none.  It does not know rsLoRA."""
    yield from _plain(lora)
    if lora.odd_rank is not None:
        yield f"{lora.odd_rank} has rank {lora.ranks[lora.odd_rank][0]} and r is {lora.r}: it takes one rank"
    if lora.missing is not None:
        yield f"{lora.missing} has no tensors: it stacks projections and needs every target in every layer"
    yield from _wrong_scale(dict.fromkeys(lora.ranks, lora.alpha / lora.r), wanted)


def _by_kind(lora: LoraFolder, wanted: Mapping[str, float]) -> Iterator[str]:
    """TGI and LoRAX stack a projection over all layers: with one rank, and dropped altogether if a layer lacks it."""
    yield from _plain(lora)
    if lora.missing is not None:
        yield f"{lora.missing} has no tensors: it would drop that projection in every layer"
    kinds: dict[str, tuple[int, int]] = {}
    for name, found in lora.ranks.items():
        if kinds.setdefault(name.rpartition(".")[2], found) != found:
            yield f"{name} has a different rank in other layers, but it stacks layers"
    yield from _wrong_scale(dict.fromkeys(lora.ranks, lora.rules.global_scale), wanted)


def _converted(lora: LoraFolder, wanted: Mapping[str, float]) -> Iterator[str]:
    """convert_lora_to_gguf.py writes lora_alpha alone; llama.cpp divides it by the rank of each tensor."""
    yield from _plain(lora)
    own = {name: lora.alpha / found[1] if lora.alpha else 1.0 for name, found in lora.ranks.items()}
    yield from _wrong_scale(own, wanted, "; export with --layout gguf")


def _plain(lora: LoraFolder) -> Iterator[str]:
    for more in more_than_lora(lora.config):
        yield f"more than a plain LoRA: {more}"
    for name, (rank_A, rank_B) in lora.ranks.items():
        if rank_A != rank_B or not rank_A:
            yield f"the factors of {name} have {rank_A} and {rank_B} slots"


def _ranks_by_pattern(lora: LoraFolder) -> Iterator[str]:
    for name, (rank, _) in lora.ranks.items():
        said = lora.rules.rank(name)
        if said != rank:
            yield f"{name} has rank {rank} where the config says {said:g}: it would not be loaded"


def _wrong_scale(own: Mapping[str, float], wanted: Mapping[str, float], instead: str = "") -> Iterator[str]:
    for name, scale in own.items():
        if scale != wanted[name]:
            yield f"it would scale {name} by {scale:.4g} instead of {wanted[name]:.4g}{instead}"


# ---------------------------------------------------------------------------------------------------------- a GGUF


def verdicts_for_gguf(
    file: GgufFile,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, int]],
    base: str = "BASE",
    is_base_quantised: bool = False,
) -> dict[str, Verdict]:
    """{engine: verdict} of an adapter file of scale 1 for a base whose targets are {module: (I, O)}; only llama.cpp and
    engines built on it read such files.  Other arguments as in `verdicts_for_folder`."""
    verdict = _verdict(_llama_cpp(file, architecture, shapes), "")
    if not verdict.works:
        return {LLAMA_CPP: verdict, OLLAMA: verdict}
    note, original = _for_converter(base, is_base_quantised)
    convert = f"{note}python convert_hf_to_gguf.py {original} --outfile base.gguf"
    return {
        LLAMA_CPP: Verdict("", f"{convert}\nllama-server -m base.gguf --lora adapter.gguf"),
        OLLAMA: Verdict("", "FROM ./base.gguf\nADAPTER ./adapter.gguf"),
    }


def _llama_cpp(file: GgufFile, architecture: Architecture, shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """The requirements of its loader: kind of file, architecture of the base, complete pairs, shapes of the base."""
    for key, wanted in (("general.type", "adapter"), (TYPE_KEY, "lora"), ("general.architecture", architecture.name)):
        if file.keys.get(key) != wanted:
            yield f"{key} is {file.keys.get(key)!r} and must be {wanted!r}"
    modules = {name: module for module, name in architecture.tensor_names(shapes).items()}
    alpha = file.keys.get(ALPHA_KEY, 0.0)
    for tensor in file.tensors:
        name, _, kind = tensor.rpartition(".")
        if kind not in KINDS or name not in modules:
            yield f"the base has no tensor for {tensor}"
            continue
        pair = [file.tensors.get(f"{name}.{wanted}") for wanted in KINDS]
        A, B = pair
        if A is None or B is None:
            yield f"{name} has only its {kind}"
            continue
        if (A.shape[1], B.shape[0]) != shapes[modules[name]] or A.shape[0] != B.shape[1]:
            yield f"{name} is {tuple(B.shape)} × {tuple(A.shape)}, which does not fit the base"
        if alpha and alpha != B.shape[1]:
            yield f"it would scale {name} by {alpha / B.shape[1]:.4g} instead of 1"
