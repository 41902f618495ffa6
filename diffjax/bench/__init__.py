"""What things cost: `python -m diffjax.bench`."""
