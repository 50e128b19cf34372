"""The commands and their modules; nothing is imported here."""

COMMAND_GROUPS = {
    "before a run": {
        "doctor": ("sora_llm.commands.cmd_doctor", "check whether this machine can train"),
        "convert": ("sora_llm.commands.cmd_convert", "a config for axolotl or LLaMA-Factory as one of ours"),
        "preprocess": ("sora_llm.commands.cmd_preprocess", "tokenise the data into the cache and report what is in it"),
        "estimate": ("sora_llm.commands.cmd_estimate", "memory per process of a config, before anything is loaded"),
    },
    "training": {
        "train": ("sora_llm.train", "train a config, cut the ranks, export a verified LoRA"),
    },
    "results": {
        "inspect": ("sora_llm.commands.cmd_inspect", "results of a run; ranks and spectra of any plain LoRA"),
        "evaluate": (
            "sora_llm.commands.cmd_evaluate",
            "the loss on a data set, of a base and of an adapter on it",
        ),
        "generate": ("sora_llm.commands.cmd_generate", "answers to prompts, of the adapter and of its base"),
        "chat": ("sora_llm.commands.cmd_chat", "chat with the adapter in the terminal"),
    },
    "export": {
        "export": (
            "sora_llm.commands.cmd_export",
            "export for another engine, smaller, merged into its base, or a stage of a path",
        ),
        "consensus": ("sora_llm.commands.cmd_consensus", "merge separately trained adapters into one of a given size"),
        "recommend-ranks": ("sora_llm.commands.cmd_recommend_ranks", "its ranks as a config for plain PEFT or axolotl"),
    },
    "shell": {
        "completion": ("sora_llm.commands.cmd_completion", "a script that completes these commands in a shell"),
    },
}
"""Commands in the order in which they are needed: heading → command → (module, description)."""

COMMANDS = {name: command for commands in COMMAND_GROUPS.values() for name, command in commands.items()}
