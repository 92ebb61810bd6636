"""Compare fine-tuning of sketch tables with LoRA, QLoRA and training everything."""
