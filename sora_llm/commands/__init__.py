"""Which commands there are, and where; nothing is imported here."""

JOURNEY = {
    "before a run": {
        "doctor": ("sora_llm.commands.cmd_doctor", "try out whether this machine can train"),
        "preprocess": ("sora_llm.commands.cmd_preprocess", "tokenise the data into the cache and report what is in it"),
        "estimate": ("sora_llm.commands.cmd_estimate", "memory per process of a config, before anything is loaded"),
    },
    "the run": {
        "train": ("sora_llm.train", "train a config, cut the ranks, export a verified LoRA"),
    },
    "what came of it": {
        "inspect": ("sora_llm.commands.cmd_inspect", "what became of a run; ranks and spectra of any plain LoRA"),
        "evaluate": (
            "sora_llm.commands.cmd_evaluate",
            "the loss on a data set, of a base and of an adapter on it",
        ),
        "generate": ("sora_llm.commands.cmd_generate", "answers to prompts, of the adapter and of its base"),
        "chat": ("sora_llm.commands.cmd_chat", "a dialogue with the adapter at the terminal"),
    },
    "where it goes": {
        "export": (
            "sora_llm.commands.cmd_export",
            "an adapter for another engine, smaller, merged into its base, or a stage of a path",
        ),
        "consensus": ("sora_llm.commands.cmd_consensus", "adapters trained apart become one, of the size asked for"),
        "recommend-ranks": ("sora_llm.commands.cmd_recommend_ranks", "its ranks as a config for plain PEFT or axolotl"),
    },
    "at the terminal": {
        "completion": ("sora_llm.commands.cmd_completion", "a script that completes these commands in a shell"),
    },
}
"""In the order in which they are needed: heading → command → (module, what it does)."""

COMMANDS = {name: command for commands in JOURNEY.values() for name, command in commands.items()}
