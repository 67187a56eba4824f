"""Pictures of any kind to 8-bit RGB: sources, headers, reading, folders."""
