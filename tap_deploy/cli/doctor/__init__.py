"""``tap-export doctor``: findings on this machine and its packages."""
