"""Checkpoints on disk, on the Hugging Face Hub and in object storage: locating, checking, loading and converting."""
