"""What every command line shares: exit codes, progress, extras, notes."""
