"""fp16 graphs: typed weights and values, fp32 islands where fp16 overflows."""
