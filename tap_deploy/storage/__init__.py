"""Files on disk: whole or not there, locked, and read without trust."""
