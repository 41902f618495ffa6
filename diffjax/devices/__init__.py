"""Device meshes, data parallelism and processes."""
