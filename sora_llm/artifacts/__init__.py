"""Files exchanged with other tools: LoRAs, llama.cpp's format, merged models, cards and certificates."""
