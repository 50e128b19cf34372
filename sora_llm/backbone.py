"""Loading the frozen model and its tokenizer: with `quantised` and `reread_weights`, the only code that uses
transformers' loading and bitsandbytes."""

from __future__ import annotations

import copy
import gc
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sora_llm.base_files import has_tokenizer, tokenizer_files
from sora_llm.base_spec import COMPUTE_DTYPES, DTYPES, BackboneSpec
from sora_llm.errors import UserError, first_line
from sora_llm.inject import forbid_cpu_repack
from sora_llm.quantised import (
    QuantisedFiles,
    has_4bit_weights,
    is_quantised,
    match_loading_format,
    quantised_files,
    quantization_config_of,
)
from sora_llm.targets import has_other_inputs
from sora_llm.terminal import warn

SENTENCEPIECE_PROBES = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "def f(x):\n    return x ** 2  # naïve 数学 🙂",
    "How many dollars is $1,234.56 + 7%?\n\n### Response:\n",
)


def load_model_config(spec: BackboneSpec, *, needs_files: bool = True) -> Any:
    """The model's transformers config.  Unless the model `needs_files`, a local folder may hold nothing else.

    Raises:
        UserError: no such folder or hub id, an unreadable config, damaged weights, not a decoder that can be loaded, or
            files already quantised in a way that differs from `spec`.
    """
    config = _read_model_config(spec, needs_files)
    files = quantised_files(config)
    if files is not None:
        _refuse_other_form(spec, files)
    return config


def _read_model_config(spec: BackboneSpec, needs_files: bool = True) -> Any:
    folder = spec.folder
    looks_local = spec.name_or_path.startswith((".", "/", "~")) or spec.name_or_path.count("/") > 1
    if looks_local and not folder.is_dir():
        seen_from = "" if folder.is_absolute() else f" (from {Path.cwd()})"
        raise UserError(f"model.name_or_path: there is no folder {spec.name_or_path}{seen_from}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path: the folder {spec.name_or_path} has no config.json, so it holds no model")
    if folder.is_dir() and spec.revision is not None:
        raise UserError(f"model.revision is {spec.revision!r} but {folder} is a local folder; leave it null")
    packed = _check_files(folder) if folder.is_dir() and needs_files else None
    config = _from_pretrained(AutoConfig, spec, "config")
    if packed is not None and not is_quantised(config):
        raise UserError(
            f"model.name_or_path: {packed} holds bitsandbytes 4-bit weights, but the config.json next to it has no "
            "quantization_config; restore the config.json that the model was saved with"
        )
    if config.get_text_config().__class__ not in AutoModelForCausalLM._model_mapping and not spec.trust_remote_code:
        raise UserError(
            f"model.name_or_path: {spec.name_or_path} is a {config.model_type!r} model, which is not a decoder that "
            "AutoModelForCausalLM loads; name a causal language model"
        )
    return config


def _refuse_other_form(spec: BackboneSpec, files: QuantisedFiles) -> None:
    """UserError unless quantised files are to be loaded as they are.  The dtypes in which their weights are multiplied
    and stored may differ: neither changes a bit of them."""
    four = files.bits == 4
    wanted: dict[str, tuple[Any, Any]] = {
        "load_in_4bit": (four, spec.load_in_4bit),
        "load_in_8bit": (not four, spec.load_in_8bit),
    }
    if four:
        wanted["bnb_4bit_quant_type"] = (files.quant_type, spec.quant_type)
        wanted["bnb_4bit_use_double_quant"] = (files.double_quant, spec.double_quant)
    keys = [f"quantization.{key}: {str(own).lower()}" for key, (own, said) in wanted.items() if own != said]
    if keys:
        raise UserError(
            f"model.name_or_path: {spec.name_or_path} is already quantised ({files}, by its config.json); set "
            f"{', '.join(keys)}, or name the unquantised model"
        )


def spec_from_files(spec: BackboneSpec) -> BackboneSpec:
    """`spec` with the dtype and quantisation of the base's files, for a base without a run that says how to load it.

    Raises:
        UserError: as in `load_model_config`.
    """
    config = _read_model_config(spec)
    spec = replace(spec, dtype=dtype_name(config))
    files = quantised_files(config)
    if files is not None:
        spec = replace(
            spec,
            load_in_4bit=files.bits == 4,
            load_in_8bit=files.bits == 8,
            quant_type=files.quant_type,
            double_quant=files.double_quant,
            compute_dtype=files.compute_dtype,
        )
    return spec


def _check_files(folder: Path) -> Path | None:
    """Check a local checkpoint's files at no cost: headers of the weights, presence of a tokenizer.  Returns one of its
    files that holds 4-bit weights, if any."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("*.bin")):
        raise UserError(f"model.name_or_path: the folder {folder} holds no weights (*.safetensors)")
    packed = None
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:  # reads the header and compares the file's size with it
                packed = path if has_4bit_weights(file) else packed
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.name_or_path: the weights {path} are damaged: {error}") from None
    if not has_tokenizer(folder):
        raise UserError(
            f"model.name_or_path: the folder {folder} has no tokenizer (tokenizer.json or tokenizer.model); copy the "
            "base model's tokenizer files into it"
        )
    return packed


def load_tokenizer(spec: BackboneSpec) -> Any:
    """The model's tokenizer, unchanged: no token is added, since padding is masked by position and needs none.

    Raises:
        UserError: it cannot be loaded, or was built from a tokenizer.model alone and does not tokenise like it.
    """
    tokenizer = _from_pretrained(AutoTokenizer, spec, "tokenizer")
    files = {path.name: path for path in tokenizer_files(spec)}
    if "tokenizer.model" in files and "tokenizer.json" not in files:
        _check_against_sentencepiece(tokenizer, files["tokenizer.model"])
    return tokenizer


def _check_against_sentencepiece(tokenizer: Any, path: Path) -> None:
    """Compare with sentencepiece: some tokenizers that transformers 5.23 converts split some texts differently."""
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(path))
    for text in SENTENCEPIECE_PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != reference.encode(text):
            raise UserError(
                f"the tokenizer that transformers builds from {path} alone splits {text!r} differently from "
                "sentencepiece; put the base model's tokenizer.json next to it"
            )


def _from_pretrained(factory: Any, spec: BackboneSpec, what: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(str(spec.folder), **spec.source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error) and not spec.trust_remote_code:
            raise UserError(
                f"{spec.name_or_path} comes with its own Python code, which runs only if you allow it: "
                "model.trust_remote_code: true in the config of a run, --trust-remote-code for a command"
            ) from error
        reason = first_line(error)
        if not spec.folder.is_dir():
            reason = f"there is no such folder, and from the hub: {reason}"
        raise UserError(
            f"the {what} of model.name_or_path {spec.name_or_path} cannot be loaded: {reason[:300]}"
        ) from error
    except Exception as error:  # safetensors and tokenizers raise their own types for a damaged file
        known = ("safetensors", "safetensors_rust", "tokenizers", "huggingface_hub", "builtins")
        if type(error).__module__.split(".")[0] not in known:
            raise
        raise UserError(
            f"the {what} of model.name_or_path {spec.name_or_path} cannot be read and may be damaged: "
            f"{first_line(error)[:300]}"
        ) from error


def num_embeddings(model: Any) -> int:
    """How many token ids a model has an embedding for."""
    return int(model.get_input_embeddings().num_embeddings)


def pad_token_id(tokenizer: Any, model: nn.Module) -> int:
    """An id to fill rows with; any that the model has an embedding for will do, since padding is masked by position and
    never enters the loss.  (Tokenizers with a [PAD] of their own often come with models that have none for it.)"""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if candidate is not None and candidate < num_embeddings(model):
            return int(candidate)
    return 0


def dtype_name(config: Any) -> str:
    """The dtype of a model's files according to its transformers config; bfloat16 if it does not say."""
    dtype = _name_of(getattr(config, "dtype", None))
    return dtype if dtype in COMPUTE_DTYPES else "bfloat16"


def max_positions(config: Any) -> int | None:
    """The maximum number of tokens for the model of a transformers config; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_sequence_len(config: Any, sequence_len: int, name_or_path: str) -> None:
    """UserError if rows of `sequence_len` tokens do not fit into the model's positions."""
    positions = max_positions(config)
    if positions is not None and sequence_len > positions:
        raise UserError(
            f"data.sequence_len is {sequence_len} but {name_or_path} has {positions} positions; set data.sequence_len "
            f"to {positions} or less"
        )


def skeleton(config: Any, spec: BackboneSpec) -> nn.Module:
    """The model without its weights (meta device): names and shapes before anything is loaded.

    Raises:
        UserError: an attention implementation that this machine or this model does not have, or a config that names
            something else that transformers does not know.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=spec.trust_remote_code, attn_implementation=spec.attn_implementation
            )
    except (ImportError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"model.attn_implementation {spec.attn_implementation} cannot be used: {reason[:300]}"
        ) from error
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"transformers {transformers.__version__} cannot make the model that the config.json of "
            f"{spec.name_or_path} describes: {type(error).__name__} {first_line(error)[:300]}"
        ) from error


def check_weights(spec: BackboneSpec, config: Any) -> None:
    """Compare the weights that a local base's files name with those of the model that its config.json describes, before
    anything is loaded; `config` is the transformers config made of it.

    Of safetensors only headers are read.  Skipped for files on the hub, which would be fetched, for pickles, and for
    quantised files, which name more than the model's own tensors.

    Raises:
        UserError: weights that are missing, or have other shapes.
    """
    if any(spec.folder.glob("*.safetensors")) and quantised_files(config) is None:
        model, loaded = _load_model(spec, device_map="meta")
        _refuse_random_weights(loaded, spec, model)


def check_attention(spec: BackboneSpec) -> None:
    """UserError if this machine cannot train through the attention; `skeleton` refuses missing implementations."""
    if spec.attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError(
            "model.attn_implementation flex_attention cannot be used: torch has no backward pass of it without a GPU; "
            "set it to sdpa"
        )


def load_backbone(
    spec: BackboneSpec,
    device: torch.device | str,
    *,
    gradient_checkpointing: bool = False,
    warn: Callable[[str], None] = warn,
) -> nn.Module:
    """The frozen model on `device`, quantised as `spec` says, ready to be injected; `warn` is told of tensors in its
    files that the model has no place for.

    Raises:
        UserError: weights that are missing, damaged or of other shapes, or a quantisation that this machine cannot run.
    """
    device = torch.device(device)
    options: dict[str, Any] = {"device_map": {"": device.index or 0 if device.type == "cuda" else device.type}}
    config = _from_pretrained(AutoConfig, spec, "config")
    said = quantization_config_of(config)
    if said is not None:  # already quantised; the rest is in the files
        config.quantization_config = {**said, "bnb_4bit_compute_dtype": spec.compute_dtype}
        options["config"] = config
    elif (quantization := _quantization(spec)) is not None:
        options["quantization_config"] = quantization
    model, loaded = _load_model(spec, **options)
    _refuse_random_weights(loaded, spec, model)
    unexpected = sorted(loaded["unexpected_keys"])
    if unexpected and not has_other_inputs(config):  # of whose files the text model is loaded alone
        warn(
            f"the files of {spec.name_or_path} hold {_some(unexpected)}, which the model that its config.json "
            "describes does not have; is it the right config?"
        )
    model.requires_grad_(False)
    model.config.use_cache = False  # a cache also changes what packed samples see
    forbid_cpu_repack(model)
    if said is not None:
        match_loading_format(model, DTYPES[spec.dtype], DTYPES[spec.quant_storage])
    if gradient_checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    return model


def _load_model(spec: BackboneSpec, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model and transformers' loading info, with random numbers for weights that the files lack."""
    # Under ZeRO-3 transformers would shard while loading, which it cannot do for quantised weights: every process
    # loads the whole model, and the engine shards it afterwards.
    unset_hf_deepspeed_config()
    model, loaded = _from_pretrained(
        AutoModelForCausalLM,
        spec,
        "model",
        dtype=DTYPES[spec.dtype],
        attn_implementation=spec.attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # like missing ones, for `_refuse_random_weights`
        **options,
    )
    return model, loaded


def _refuse_random_weights(loaded: Mapping[str, Any], spec: BackboneSpec, model: nn.Module) -> None:
    """UserError if the files lack weights of the model, or have them in other shapes: transformers fills both with
    random numbers, and only logs it.  `loaded` is its loading info.  Buffers that are missing are computed."""
    buffers = {name for name, _ in model.named_buffers()}
    if missing := sorted(set(loaded["missing_keys"]) - buffers):
        raise UserError(
            f"the files of {spec.name_or_path} lack {_some(missing)}, which would be random: get them again, or name a "
            "model that was saved whole, without wrappers (their names would begin differently)"
        )
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, in_files, in_model = mismatched[0]
        raise UserError(
            f"{name} of {spec.name_or_path} is {list(in_files)} in its files, but {list(in_model)} by its config.json: "
            "one of the two belongs to another model"
        )


def _some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def spec_from_model(model: Any) -> BackboneSpec | None:
    """How an already loaded transformers model is held, judging by its layers; None if that is not a form that can be
    loaded here, or several."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    dtype, head = _name_of(model.get_input_embeddings().weight.dtype), model.get_output_embeddings()
    whole = BackboneSpec(str(getattr(model, "name_or_path", "")), dtype=dtype)

    def as_held(layer: Any) -> BackboneSpec:
        if isinstance(layer, Linear4bit):
            weight: Any = layer.weight
            return replace(
                whole,
                load_in_4bit=True,
                quant_type=weight.quant_type,
                double_quant=weight.compress_statistics,
                compute_dtype=_name_of(layer.compute_dtype or dtype),
            )
        if isinstance(layer, Linear8bitLt):
            return replace(whole, load_in_8bit=True)
        return replace(whole, dtype=_name_of(layer.weight.dtype))

    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    # An unquantised head proves nothing: it is left as it was when other layers are quantised.
    said = [layer for layer in linears if layer is not head or isinstance(layer, Linear4bit | Linear8bitLt)]
    forms = {as_held(layer) for layer in said} or {whole}
    form = forms.pop()
    is_known = form.is_quantised or quantization_config_of(model.config) is None
    is_loadable = form.dtype == dtype and dtype in COMPUTE_DTYPES
    return form if not forms and is_known and is_loadable else None


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def module_names(model: nn.Module) -> set[str] | None:
    """The names of the modules of a fresh model of the same class and config; None for a class that needs more than a
    config to be constructed."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            fresh = type(model)(copy.deepcopy(model.config))
    except Exception:  # whatever its author wrote
        return None
    return {name for name, _ in fresh.named_modules()}


def free_unused() -> None:
    """Free the memory of models held only by their own reference cycles, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def enable_checkpointing(model: Any) -> None:
    """Let the model recompute each block's activations in the backward pass.

    Non-reentrant: reentrant checkpointing loses the gradients of frozen inputs.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers from 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _quantization(spec: BackboneSpec) -> BitsAndBytesConfig | None:
    if spec.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.quant_type,
            bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=DTYPES[spec.compute_dtype],
            bnb_4bit_quant_storage=DTYPES[spec.quant_storage],
        )
    return BitsAndBytesConfig(load_in_8bit=True) if spec.load_in_8bit else None


def from_pretrained_args(spec: BackboneSpec, config: Any) -> str:
    """The arguments of from_pretrained that load this backbone as in training, as Python text; and, in words, what to
    do afterwards if the files have another compute dtype."""
    options = f"dtype=torch.{spec.dtype}"
    files = quantised_files(config)
    if files is not None:
        if spec.load_in_8bit or files.compute_dtype == spec.compute_dtype:
            return options
        return (
            f"{options}\n\nand then `compute_dtype = torch.{spec.compute_dtype}` set in each of its `Linear4bit` layers"
        )
    if spec.load_in_8bit:
        return f"{options}, quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    if not spec.load_in_4bit:
        return options
    return (
        f"{options}, quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
        f'bnb_4bit_quant_type="{spec.quant_type}",'
        f" bnb_4bit_use_double_quant={spec.double_quant}, bnb_4bit_compute_dtype=torch.{spec.compute_dtype})"
    )


def dequantised(weight: Tensor, spec: BackboneSpec, device: torch.device | str) -> Tensor:
    """A weight (O, I) of the base's files after quantisation by a 4-bit layer of `spec`: the numbers that it multiplies
    with, bit for bit, on the CPU in spec.dtype."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.to(device, DTYPES[spec.dtype]),
        compress_statistics=spec.double_quant,
        quant_type=spec.quant_type,
        quant_storage=DTYPES[spec.quant_storage],
    )
    return functional.dequantize_4bit(codes, state).cpu()


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Announcements for the authors of the libraries that we call, not for users of this one.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|deepspeed|accelerate|peft)\b")
    # DDP's reducer distinguishes (O, 1) with strides (1, O) and (1, 1): the same bytes in the same order.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
