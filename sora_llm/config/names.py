"""Names and values from other trainers, and their equivalents here."""

from __future__ import annotations

from typing import Any

# Names that people know from elsewhere: our key → the names accepted for it in its section.
NAMES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "model.name_or_path": ("base_model", "model_name_or_path", "pretrained_model_name_or_path", "model_id"),
    "model.dtype": ("torch_dtype",),
    "model.adapter": ("lora_model_dir", "adapter_name_or_path"),
    "model.attn_implementation": ("attention", "attn_impl", "_attn_implementation"),
    "sora.r": ("lora_r", "lora_rank", "rank", "init_r"),
    "sora.lora_alpha": ("alpha",),
    "sora.lora_dropout": ("dropout",),
    "sora.target_modules": ("lora_target_modules", "lora_target"),
    "sora.sparse_lambda": ("lambda", "lambda_"),
    "sora.target_rank": ("target_r",),
    "data.sequence_len": ("cutoff_len", "max_length", "max_seq_length", "max_seq_len"),
    "data.sample_packing": ("packing",),
    "data.chat_template": ("template",),
    "data.train_on_inputs": ("train_on_prompt",),
    "data.train_on_last_turn_only": ("mask_history",),
    "data.num_proc": ("preprocessing_num_workers",),
    "data.cache_dir": ("dataset_prepared_path",),
    "data.val_datasets": ("test_datasets", "eval_dataset"),
    "train.per_device_train_batch_size": ("micro_batch_size",),
    "train.gradient_accumulation_steps": ("gradient_accumulation",),
    "train.num_train_epochs": ("num_epochs", "epochs"),
    "train.learning_rate": ("lr",),
    "train.lr_scheduler_type": ("lr_scheduler",),
    "train.min_lr_ratio": ("cosine_min_lr_ratio", "min_lr_rate"),
    "train.max_grad_norm": ("gradient_clipping",),
    "distributed.deepspeed_config": ("deepspeed", "deepspeed_config_file"),
    "data.val_set_size": ("val_size",),
    "evaluation.per_device_eval_batch_size": ("eval_batch_size",),
    "output.resume": ("resume_from_checkpoint",),
}
ALIASES = {f"{key.partition('.')[0]}.{name}": key for key, names in NAMES_ELSEWHERE.items() for name in names}

# Names from elsewhere without a key here, in any section: what to do instead.
NO_EQUIVALENT = {
    "adapter": "leave it out; training always produces SoRA adapters, on a 4-bit base with "
    "quantization.load_in_4bit (model.adapter names a saved one to start from)",
    "finetuning_type": "leave it out; training always produces SoRA adapters",
    "stage": "leave it out; training is always supervised, and ZeRO's stage is distributed.strategy",
    "rl": "leave it out; training is always supervised",
    "model_type": "leave it out; the base's config.json says it",
    "tokenizer_type": "leave it out; the base's files say it",
    "do_train": "leave it out; a run always trains",
    "do_eval": "set evaluation.eval_steps; dev loss is always measured before and after training",
    "evals_per_epoch": "set evaluation.eval_steps",
    "saves_per_epoch": "set output.save_steps",
    "dataset": "set data.datasets, a list of data sets with a path and a type each",
    "train_dataset": "set data.datasets, a list of data sets with a path and a type each",
    "dataset_dir": "set the path of each entry of data.datasets",
    "max_samples": "leave it out; limit a run with train.max_steps, or use a smaller file",
    "lora_target_linear": "set sora.target_modules: all-linear",
    "lora_modules_to_save": "leave it out; only adapters are trained",
    "quantization_bit": "set quantization.load_in_4bit or load_in_8bit",
    "flash_attention": "set model.attn_implementation: flash_attention_2",
    "flash_attn": "set model.attn_implementation, for example to flash_attention_2",
    "gradient_checkpointing_kwargs": "leave it out; checkpointing is never reentrant",
    "pad_to_sequence_len": "leave it out; batches are as long as their longest row",
    "overwrite_output_dir": "name a new output.output_dir; output.resume says whether a run resumes",
    "ddp_timeout": "set distributed.timeout_minutes",
    "plot_loss": "leave it out; report.html has the charts",
    "tf32": "leave it out; model.dtype sets the precision of the base",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_name": "leave it out; trackers take the name of output.output_dir",
    "wandb_watch": "leave it out; trackers get what metrics.jsonl has",
    "wandb_log_model": "leave it out; the adapter stays in output.output_dir",
    "evaluation_strategy": "set evaluation.eval_steps; dev loss is always measured before and after training",
    "eval_strategy": "set evaluation.eval_steps; dev loss is always measured before and after training",
    "save_strategy": "set output.save_steps",
    "logging_strategy": "set output.logging_steps",
    "group_by_length": "leave it out; without data.sample_packing rows of similar length are batched together anyway",
    "optim": "leave it out; the optimizer is always AdamW with the proximal step",
    "optimizer": "leave it out; the optimizer is always AdamW with the proximal step",
    "bf16": "set model.dtype: bfloat16, or leave it out if it is false",
    "fp16": "set model.dtype: float16, or leave it out if it is false",
    **dict.fromkeys(
        ("eval_sample_packing", "eval_packing"), "leave it out; dev rows are measured unpacked, which changes no loss"
    ),
    "use_peft": "leave it out; training always produces SoRA adapters",
    "strict": "leave it out; a key that is not ours always ends the run",
    "xformers_attention": "set model.attn_implementation",
    "overwrite_cache": "leave it out; the cache goes by the contents of the files",
    "dataset_name": "set data.datasets, a list of data sets with a path and a type each",
    "peft_use_dora": "leave it out; adapters are plain LoRA",
    "lora_fan_in_fan_out": "leave it out; such layers are not supported here",
    "batch_size": "set train.per_device_train_batch_size, the rows of one process and one forward pass",
    "train_batch_size": "set train.per_device_train_batch_size, the rows of one process and one forward pass",
    "bias": "leave it out; biases are never trained",
    "use_rslora": "leave it out; set sora.lora_alpha for another scale",
    "modules_to_save": "leave it out; only adapters are trained",
    "use_dora": "leave it out; adapters are plain LoRA",
    "init_lora_weights": "leave it out; B starts at 0",
    "rank_pattern": "leave it out; ranks are found, sora.budgets gives modules budgets of their own",
    "alpha_pattern": "leave it out; every module has the scale lora_alpha / r",
    **dict.fromkeys(
        ("layers_to_transform", "exclude_modules"),
        "leave it out; sora.target_modules names what gets an adapter, by the ends of module names",
    ),
    "tinit": "set sora.dense_ratio, the share of the steps before pruning begins",
    "tfinal": "set sora.consensus_at, the share of the steps after which pruning has ended",
    "deltaT": "leave it out; gates are pruned in every step between sora.dense_ratio and sora.consensus_at",
    "orth_reg_weight": "leave it out; there is no orthogonality loss",
    "total_step": "set train.max_steps",
    **dict.fromkeys(
        ("loraplus_lr_ratio", "loraplus_lr_embedding"), "leave it out; A and B have the same learning rate"
    ),
    "lr_scheduler_kwargs": "set train.min_lr_ratio for its min_lr_rate, and leave the rest out",
    "rope_scaling": "leave it out; the base's config.json says it",
    "tokenizer_name": "leave it out; the tokenizer is the base's own",
    "shuffle": "leave it out; rows are shuffled by train.seed",
    "padding_free": "set data.sample_packing",
    "logging_dir": "leave it out; trackers write to output.output_dir",
    "hub_strategy": "leave it out; output.push_to_hub uploads the verified adapter at the end",
    "assistant_only_loss": "leave it out; only answers are trained on unless data.train_on_inputs is true",
    "completion_only_loss": "leave it out; only answers are trained on unless data.train_on_inputs is true",
    "load_best_model_at_end": "set evaluation.early_stopping_patience, under which the adapter is the best one's",
    "metric_for_best_model": "leave it out; it is the dev loss",
    "neftune_noise_alpha": "leave it out; no noise is added to embeddings",
    **dict.fromkeys(
        ("use_liger_kernel", "enable_liger_kernel", "liger_kernel"),
        "set train.torch_compile, which fuses norms, rotary embedding and activations too",
    ),
    **dict.fromkeys(
        ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy"),
        "leave it out; the loss never holds all logits anyway, where the model allows that",
    ),
    "torch_compile_backend": "leave it out; train.torch_compile uses torch's own",
    "torch_compile_mode": "leave it out; train.torch_compile uses torch's own",
    "fsdp": "set distributed.strategy: zero3",
    "fsdp_config": "set distributed.strategy: zero3",
    "device_map": "leave it out; every process has its own device, and distributed.strategy: zero3 shards the base",
    "dataloader_num_workers": "leave it out; rows are tokenised before training, in data.num_proc processes",
    "dataset_num_proc": "set data.num_proc",
    "bits": "set quantization.load_in_4bit or load_in_8bit",
    "wandb_project": "leave it out if it is empty, else set output.report_to: [wandb], with no other tracker, and the "
    "environment variable WANDB_PROJECT",
    "run_name": "leave it out; trackers take the name of output.output_dir",
    **dict.fromkeys(
        ("subset", "dataset_config", "dataset_config_name", "config_name"), "set name: … of the data set, a hub's"
    ),
    "dataset_text_field": "set columns: {text: …} of the data set",
    "field_messages": "set columns: {messages: …} of the data set, or {conversations: …} of type sharegpt",
    "field_output": "set columns: {output: …} of the data set",
    "field_input": "set columns: {input: …} of the data set",
    "field_system": "leave it out; a column named system is read where a row has one",
    "message_field_role": "leave it out; type messages knows role and content, type sharegpt from and value",
    "message_field_content": "leave it out; type messages knows role and content, type sharegpt from and value",
    "message_property_mappings": "leave it out; type messages knows role and content, type sharegpt from and value",
    "roles_to_train": "leave it out; the assistant's turns are trained on, or what the rows' own weights say",
    "train_on_eos": "leave it out; the token that ends an answer is trained on",
    "field_instruction": "set columns: {instruction: …} of the data set",
    "special_tokens": "leave it out; tokenizers are taken as they are",
    **dict.fromkeys(
        ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), "leave it out; adapters are one fused function anyway"
    ),
    "plugins": "leave it out; there are none",
    "conversation": "leave it out; data.chat_template says how turns are rendered",
    "shards": "leave it out; use a smaller file",
    **dict.fromkeys(
        ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu", "liger_layer_norm"),
        "set train.torch_compile, which fuses norms, rotary embedding and activations too",
    ),
    "train_file": "set data.datasets",
    "validation_file": "set data.val_datasets",
    "ds_type": "leave it out; a file's name says its format",
}

# Types of rows: ours → the names that others have for them.
TYPES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "alpaca": ("alpaca_chat", "alpaca_instruct", "alpaca_w_system", "instruct"),
    "messages": ("chat_template", "chatml"),
    "sharegpt": (),
    "completion": ("text", "pretrain", "pretraining"),
}

# Values from elsewhere that are none here: our key → {value: what to write instead}.
_MESSAGES = "write messages, or sharegpt for turns of from and value; data.chat_template says how they are rendered"
VALUES_ELSEWHERE: dict[str, dict[Any, str]] = {
    "data.datasets.type": {
        **{name: f"write {ours}" for ours, names in TYPES_ELSEWHERE.items() for name in names},
        **dict.fromkeys((*TYPES_ELSEWHERE["messages"], "openai", "chat", "conversational"), _MESSAGES),
        "input_output": "write custom, with a function that makes messages of the segments",
    },
    "data.val_set_size": {0: "null holds out no rows"},
    "train.max_steps": {-1: "null if train.num_train_epochs is set"},
    "train.num_train_epochs": {-1: "null if train.max_steps is set"},
    "output.report_to": {
        "all": "write [tensorboard, wandb]",
        **{name: f"write [{name}]" for name in ("wandb", "tensorboard")},
    },
    "output.save_total_limit": {0: "null keeps all"},
    "train.lr_scheduler_type": {"cosine_with_min_lr": "write cosine, with train.min_lr_ratio"},
}


def value_elsewhere(key: str, value: Any) -> str | None:
    """What to write instead of a value that has a meaning in other trainers; None if it has none that is known."""
    named = ".".join(part for part in key.replace("val_datasets", "datasets").split(".") if not part.isdigit())
    if named in ("evaluation.eval_steps", "output.save_steps", "output.logging_steps"):
        return "a number of steps, not a share of the run" if isinstance(value, float) and 0 < value < 1 else None
    if named == "data.datasets.type" and isinstance(value, str):
        value = value.partition(".")[0].partition(":")[0]  # axolotl's chat_template.default
    known = VALUES_ELSEWHERE.get(named, {})
    return known.get(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


SPELLINGS = {  # other spellings of a choice
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "torch.float32"), "float32"),
}
