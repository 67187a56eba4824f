"""Capacity estimates: work, memory and time of a model on a device, without building it."""
