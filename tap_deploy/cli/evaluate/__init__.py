"""``tap-export eval``: scores a model on labelled pictures."""
