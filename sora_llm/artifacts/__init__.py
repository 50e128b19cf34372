"""Files exchanged with other tools: LoRAs, llama.cpp's file, merged models, cards and certificates."""
