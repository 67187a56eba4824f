"""Reads pictures of any format as 8-bit RGB: sources, headers, decoding, folders."""
