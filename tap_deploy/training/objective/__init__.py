"""The training objective: batches, prompts, heads and losses."""
