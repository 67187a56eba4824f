"""Shared by all command lines: exit codes, progress, extras, notes."""
