"""Capacity before a build: work, memory and time on a device."""
