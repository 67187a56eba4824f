"""Execution of the graphs: common interfaces here, one folder per backend."""
