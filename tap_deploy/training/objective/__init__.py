"""What is learned: batches, prompts, heads and losses."""
