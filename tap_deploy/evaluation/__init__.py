"""Evaluation on COCO, LVIS and Visual Genome by the protocols of the public scripts."""
