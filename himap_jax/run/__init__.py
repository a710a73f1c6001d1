"""The command: flags, prompts, pictures, answers and output."""
