"""The parts of a run, from its config to its end; `sora_llm.train` tells the story."""
