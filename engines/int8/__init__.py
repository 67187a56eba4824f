"""int8 graphs for a bundle: which blocks, which method, which mix."""
