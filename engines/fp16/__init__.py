"""Conversion of fp32 graphs to strongly typed fp16 graphs with fp32 islands."""
