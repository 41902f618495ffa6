"""Data sets, batches and image files."""
