"""Checkpoints on disk, on the Hugging Face hub and in object storage: found, checked, read onto devices, converted."""
