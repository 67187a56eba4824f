"""Creation of a bundle's int8 graphs: options, mixed-precision search, writing, judging."""
