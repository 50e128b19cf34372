"""A config for another trainer, axolotl's or LLaMA-Factory's, as one of ours.

Most of it are names: `names.py` has them, and what to do without a key that has no equivalent.  Here is what takes
more than a name: values that mean something else, and keys that only together say what ours says alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from sora_llm.config.conversion import elsewhere
from sora_llm.config.names import NO_EQUIVALENT, TYPES_ELSEWHERE, value_elsewhere
from sora_llm.config.origin import show
from sora_llm.config.schema import Config, Dataset, Sora, Train
from sora_llm.errors import UserError

KEPT_SHARE = 0.5
"""Of r: the target_rank of a config for plain LoRA, which does not say what is to be kept."""

LORA_KEYS = ("adapter", "finetuning_type", "lora_r", "lora_rank", "lora_target")
"""One of them is in every config for LoRA."""


@dataclass
class Translated:
    """`config` is the mapping of our sections; `notes` say, by the other trainer's key, what was left out or chosen."""

    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """State our dotted key."""
        section, name = key.split(".")
        self.config.setdefault(section, {})[name] = value

    def get(self, key: str) -> Any:
        """What our dotted key was stated to be, None if it was not."""
        section, name = key.split(".")
        return self.config.get(section, {}).get(name)


def translate(theirs: Mapping[str, Any], file: str) -> Translated:
    """Our config for a flat mapping of another trainer's keys.

    Keys that ask for nothing (null, false, empty) are passed over.  What has no equivalent is a note.

    Raises:
        UserError: `file` is a config of ours, or none for LoRA, or for training that is not supervised.
    """
    _refuse(theirs, file)
    done = Translated()
    for key, value in theirs.items():
        if not _asks(value):
            _unset(done, key, value)
        elif key in _HANDLERS:
            _HANDLERS[key](done, key, value, theirs)
        elif (ours := elsewhere(key)) is not None:
            done.put(ours, value)
        else:
            done.notes[key] = NO_EQUIVALENT.get(key, "no key here is known to mean the same")
    _settle(done, theirs)
    done.config = {
        section: {name: done.config[section][name] for name in get_type_hints(cls) if name in done.config[section]}
        for section, cls in get_type_hints(Config).items()
        if section in done.config
    }
    return done


def _refuse(theirs: Mapping[str, Any], file: str) -> None:
    if any(isinstance(theirs.get(section), dict) for section in ("sora", "train", "quantization")):
        raise UserError(f"{file} has sections as a config of ours; there is nothing to translate")
    if not any(key in theirs for key in LORA_KEYS):
        raise UserError(
            f"{file} has none of the keys {', '.join(LORA_KEYS)}; give a config for LoRA with axolotl or LLaMA-Factory"
        )
    for key, supervised in (("rl", ()), ("stage", ("sft", "pt"))):
        value = theirs.get(key)
        if _asks(value) and value not in supervised:
            raise UserError(f"{file} has {key}: {value}; training here is supervised")
    for key in ("adapter", "finetuning_type"):
        if key in theirs and theirs[key] not in ("lora", "qlora"):
            raise UserError(f"{file} has {key}: {show(theirs[key])}; only LoRA becomes SoRA")


def _asks(value: Any) -> bool:
    """Whether a key with this value asks for anything; 0 does."""
    return not (value is None or value is False or value in ("", [], {}))


def _unset(done: Translated, key: str, value: Any) -> None:
    """A key that asks for nothing: only what our default would not say too."""
    if key in _WHEN_UNSET:
        done.put(*_WHEN_UNSET[key])
    elif value is False and key not in _HANDLERS and (ours := elsewhere(key)) is not None:
        done.put(ours, False)


# ------------------------------------------------------------------------------------------------- keys of their own

Handler = Callable[[Translated, str, Any, Mapping[str, Any]], None]
"""For a key whose value asks for something: the translation, the key, its value, all of their keys."""

_WHEN_UNSET = {"gradient_checkpointing": ("train.gradient_checkpointing", False), "report_to": ("output.report_to", [])}


def _passed_over(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    """For keys that say nothing ours has to say."""


def _noted(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    done.notes[key] = NO_EQUIVALENT[key]


def _precision(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    for name, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16"), ("float16", "float16")):
        if _asks(theirs.get(name)):
            done.put("model.dtype", dtype)
            return


def _all_linear(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if value:
        done.put("sora.target_modules", "all-linear")


def _targets(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if theirs.get("lora_target_linear"):
        return
    if isinstance(value, str) and key == "lora_target":
        value = "all-linear" if value == "all" else [name.strip() for name in value.split(",")]
    done.put("sora.target_modules", value)


def _attention(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    by_key = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    by_value = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager", True: "flash_attention_2"}
    if key in by_key and value:
        done.put("model.attn_implementation", by_key[key])
    elif key == "flash_attn" and isinstance(value, str | bool) and value in by_value:
        done.put("model.attn_implementation", by_value[value])


def _bits(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if value in (4, 8):
        done.put(f"quantization.load_in_{value}bit", True)
    else:
        done.notes[key] = NO_EQUIVALENT[key]


def _adapter(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if value == "qlora":
        done.put("quantization.load_in_4bit", True)


def _val_set_size(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if value:
        done.put("data.val_set_size", value)


def _steps(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    """A number of steps, as ours; a share of the run (below 1) or -1 is none."""
    if isinstance(value, float) and 0 < value < 1:
        done.notes[key] = f"set {elsewhere(key)} to a number of steps"
    elif isinstance(value, int | float) and value > 0:
        done.put(str(elsewhere(key)), int(value))


def _max_steps(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if isinstance(value, int) and value > 0:
        done.put("train.max_steps", value)
        done.config["train"].pop("num_train_epochs", None)


def _epochs(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if done.get("train.max_steps") is None:
        done.put("train.num_train_epochs", value)


def _per_epoch(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if key == "saves_per_epoch" or theirs.get("val_set_size") or theirs.get("test_datasets"):
        done.notes[key] = NO_EQUIVALENT[key]


def _strategy(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    if value not in ("no", "none", "steps"):
        done.notes[key] = NO_EQUIVALENT[key]


def _checkpointing(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    done.put("train.gradient_checkpointing", True)  # also "unsloth", "offload"


def _deepspeed(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    stage = re.search(r"(?:zero|z|ds)[_-]?([123])", str(value).rpartition("/")[2].lower())
    if stage is None:
        done.put("distributed.deepspeed_config", value)
        return
    done.put("distributed.strategy", f"zero{stage[1]}")
    done.notes[key] = f"taken for distributed.strategy: zero{stage[1]}; the rest of the file was not looked at"


def _fsdp(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    done.put("distributed.strategy", "zero3")
    done.notes[key] = "taken for distributed.strategy: zero3"


def _wandb(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    done.put("output.report_to", ["wandb"])
    done.notes[key] = f"set the environment variable WANDB_PROJECT={value}"


def _report_to(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    known = ("tensorboard", "wandb")
    names = value if isinstance(value, list) else [value]
    names = list(known) if "all" in names else [name for name in names if name != "none"]
    done.put("output.report_to", [name for name in names if name in known])
    if others := [str(name) for name in names if name not in known]:
        done.notes[key] = f"{', '.join(others)}: trackers here are {' and '.join(known)}"


def _hub(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    done.put("output.push_to_hub", True)
    done.put("output.hub_model_id", value)


def _template(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    ours = {"llama3": "llama-3", "llama2": "llama-2", "mistral_v1": "mistral"}
    if value in ("default", "tokenizer_default", "empty"):
        return
    if key == "chat_template" and value == "jinja":
        value = theirs.get("chat_template_jinja")
        if "{" in str(value):
            done.notes["chat_template_jinja"] = "write the template to a file, and name that in data.chat_template"
            return
    value = str(value).removeprefix("tokenizer_default_fallback_")
    done.put("data.chat_template", ours.get(value, value))
    if key == "template":
        done.notes[key] = (
            f"taken for data.chat_template, which is for conversations; rows of type alpaca have Alpaca's own prompt "
            f"here, not {value}'s"
        )


def _scheduler(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    known = get_args(get_type_hints(Train)["lr_scheduler_type"])
    if value in known:
        done.put("train.lr_scheduler_type", value)
    elif value == "cosine_with_min_lr":
        done.put("train.lr_scheduler_type", "cosine")
    else:
        instead = value_elsewhere("train.lr_scheduler_type", value)
        done.notes[key] = f"{value} is not one of {', '.join(known)}{f' ({instead})' if instead else ''}"


def _scheduler_kwargs(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    """Of cosine_with_min_lr, whose rate is a share of the peak, or a learning rate itself."""
    kwargs = dict(value) if isinstance(value, dict) else {}
    floor, peak = kwargs.pop("min_lr", None), theirs.get("learning_rate")
    ratio = kwargs.pop("min_lr_rate", None)
    if ratio is None and isinstance(floor, int | float) and isinstance(peak, int | float) and peak > 0:
        ratio = floor / peak
    if ratio is not None:
        done.put("train.min_lr_ratio", ratio)
    if kwargs or ratio is None:
        done.notes[key] = NO_EQUIVALENT[key]


def _datasets(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> None:
    ours = "data.val_datasets" if key == "test_datasets" else "data.datasets"
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        done.notes[key] = f"set {ours}, a list of data sets with a path and a type each"
        return
    done.put(ours, [_dataset(done, f"{key}.{index}", entry) for index, entry in enumerate(value)])


# ------------------------------------------------------------------------------------------------------- a data set

_TYPES = {name: ours for ours, names in TYPES_ELSEWHERE.items() for name in (ours, *names)}
"""The first part of theirs: ours."""
_COLUMNS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output", "field": "text"}
_PASSED_OVER = ("ds_type", "data_files", "field_messages", "message_property_mappings", "roles")
_NAMES_OF_TURNS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})


def _dataset(done: Translated, key: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of data.datasets; what it cannot say is a note."""
    found: dict[str, Any] = {}
    files = theirs.get("data_files")
    for name, value in theirs.items():
        if not _asks(value):
            continue
        if name == "path":
            found["path"] = _only(files) if files and "/" not in str(value) else value
        elif name == "type":
            found["type"] = _type(done, key, value, theirs)
        elif name in _COLUMNS:
            found.setdefault("columns", {})[_COLUMNS[name]] = value
        elif name in ("split", "train_on_split"):
            found["split"] = value
        elif name in get_type_hints(Dataset):
            found[name] = value
        elif name not in _PASSED_OVER and not name.startswith("message_field_"):
            done.notes[f"{key}.{name}"] = NO_EQUIVALENT.get(name, "no key of a data set here is known to mean the same")
    if isinstance(files, list) and len(files) > 1:
        done.notes[f"{key}.data_files"] = (
            "only the first is taken; give every file an entry of data.datasets, or a glob"
        )
    if messages := theirs.get("field_messages"):
        field_of_turns = "conversations" if found.get("type") == "sharegpt" else "messages"
        if messages != field_of_turns:
            found.setdefault("columns", {})[field_of_turns] = messages
    return found


def _only(files: Any) -> str:
    return str(files[0]) if isinstance(files, list) else str(files)


def _type(done: Translated, key: str, value: Any, theirs: Mapping[str, Any]) -> str:
    """Our type of rows; messages whose turns have other names are sharegpt's."""
    ours = _TYPES.get(re.split(r"[.:]", value)[0]) if isinstance(value, str) else None
    if ours is None:
        done.notes[f"{key}.type"] = f"{show(value)}: write custom, with a function that makes messages of a row"
        return "custom"
    if ours == "alpaca" and value != "alpaca":
        done.notes[f"{key}.type"] = (
            f"{value}: taken for alpaca, which has Alpaca's own prompt; set columns for fields that are not called "
            "instruction, input and output"
        )
    if ours != "messages":
        return ours
    turns = theirs.get("message_property_mappings") or {
        "role": theirs.get("message_field_role", "role"),
        "content": theirs.get("message_field_content", "content"),
    }
    if turns not in _NAMES_OF_TURNS:
        done.notes[f"{key}.type"] = (
            f"turns have {', '.join(map(str, turns.values()))}: type messages knows role and content, type sharegpt "
            "from and value; write custom, with a function that makes messages of a row"
        )
        return "custom"
    return ("messages", "sharegpt")[_NAMES_OF_TURNS.index(turns)]


# ----------------------------------------------------------------------------------------------------------- the end


def _settle(done: Translated, theirs: Mapping[str, Any]) -> None:
    """What only the whole says, and what plain LoRA does not say."""
    bits = [done.get(f"quantization.load_in_{bits}bit") for bits in (4, 8)]
    done.put("quantization.load_in_4bit", bool(bits[0]))  # elsewhere the default is an unquantised base
    if bits[1]:
        done.put("quantization.load_in_8bit", True)
    if done.get("data.sample_packing") is None:
        done.put("data.sample_packing", False)  # likewise
    r = done.get("sora.r")
    r = r if isinstance(r, int) else Sora.r
    if "lora_rank" in theirs and done.get("sora.lora_alpha") is None:
        done.put("sora.lora_alpha", 2 * r)  # LLaMA-Factory's default
    if any(theirs.get(key) is True for key in _RSLORA):
        alpha = done.get("sora.lora_alpha")
        alpha = alpha if isinstance(alpha, int | float) else Sora.lora_alpha
        done.put("sora.lora_alpha", round(alpha * math.sqrt(r), 4))
        done.notes["(sora.lora_alpha)"] = f"{alpha:g} · √r, for the scale of rsLoRA, which divides by √r instead of r"
    if all(done.get(f"sora.{name}") is None for name in ("target_rank", "target_params", "sparse_lambda")):
        kept = math.ceil(KEPT_SHARE * r)
        done.put("sora.target_rank", kept)
        done.notes["(sora.target_rank)"] = f"{kept}, half of r, was chosen here: the mean rank that is kept"


_RSLORA = ("use_rslora", "peft_use_rslora")
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_RSLORA, _passed_over),  # see _settle
    **dict.fromkeys(
        ("strict", "model_type", "tokenizer_type", "is_llama_derived_model", "do_train", "stage", "rl"), _passed_over
    ),
    **dict.fromkeys(("do_eval", "plot_loss"), _passed_over),
    **dict.fromkeys(("finetuning_type", "optimizer", "optim", "use_peft", "overwrite_cache"), _passed_over),
    "chat_template_jinja": _passed_over,  # see chat_template
    **dict.fromkeys(("pad_to_sequence_len", "local_rank", "debug", "device", "eval_table_size"), _passed_over),
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "float16"), _precision),
    **dict.fromkeys(("flash_attention", "sdp_attention", "eager_attention", "flash_attn"), _attention),
    **dict.fromkeys(("lora_target", "lora_target_modules"), _targets),
    **dict.fromkeys(("quantization_bit", "bits"), _bits),
    **dict.fromkeys(("val_set_size", "val_size"), _val_set_size),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps", "save_total_limit"), _steps),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), _epochs),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), _scheduler),
    **dict.fromkeys(("fsdp", "fsdp_config"), _fsdp),
    **dict.fromkeys(("chat_template", "template"), _template),
    **dict.fromkeys(("datasets", "test_datasets"), _datasets),
    **dict.fromkeys(("wandb_entity", "wandb_name", "wandb_watch", "wandb_log_model"), _noted),
    "lora_target_linear": _all_linear,
    "adapter": _adapter,
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy"), _strategy),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), _per_epoch),
    "lr_scheduler_kwargs": _scheduler_kwargs,
    "max_steps": _max_steps,
    "gradient_checkpointing": _checkpointing,
    "deepspeed": _deepspeed,
    "wandb_project": _wandb,
    "report_to": _report_to,
    "hub_model_id": _hub,
}
