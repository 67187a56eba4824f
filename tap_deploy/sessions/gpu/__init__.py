"""Graphs on a GPU: device memory, lanes, captions, whatever the backend."""
