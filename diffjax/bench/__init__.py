"""What `diffjax bench` measures."""
