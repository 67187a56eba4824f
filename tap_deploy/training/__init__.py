"""Trains a small TAP on synthetic scenes: scenes, objective, trainer.

It needs the ``train`` extra, so no other package imports it at module level.
"""
