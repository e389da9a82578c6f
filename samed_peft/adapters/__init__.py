"""SAM with LoRA or another PEFT method: add, save, load, check and describe adapters."""
