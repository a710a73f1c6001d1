"""The command: flags, prompts, pictures, answers, and the output that they go to."""
