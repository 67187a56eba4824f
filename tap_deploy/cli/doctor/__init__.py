"""``tap-export doctor``: what this machine has, what it lacks, and how to fix it."""
