"""Concepts and tokenizer of the demo model."""
