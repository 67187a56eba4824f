"""Is the deployed model still the model? Tolerances, comparisons, self-test."""
