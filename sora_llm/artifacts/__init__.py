"""Adapters as files that others read or wrote: LoRAs, llama.cpp's file, merged models, cards and certificates."""
