"""Files on disk: atomic writes, folder locks, safe readers of untrusted files."""
