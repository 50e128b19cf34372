"""What is written for others to read: LoRA folders, llama.cpp's file, merged models, their cards and certificates."""
