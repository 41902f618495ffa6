"""Measurements of what things cost, for `diffjax bench` and `diffjax dry-run`."""
