"""Training a small TAP of one's own on made scenes: scenes, objective, trainer.

Nothing outside imports this at module level: it needs the ``train`` extra.
"""
