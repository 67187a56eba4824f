"""Tokenize Anything, deployed: masks, names and captions of image regions without PyTorch."""

__version__ = "0.1.0"
