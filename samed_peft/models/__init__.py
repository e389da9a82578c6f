"""SAM as a semantic segmentation model: bases, attention, checkpoints, losses and precision."""
