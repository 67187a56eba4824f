"""Sessions run the graphs: one contract, and a folder per backend."""
