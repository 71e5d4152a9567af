"""Text, prompts and datasets to token ids."""
