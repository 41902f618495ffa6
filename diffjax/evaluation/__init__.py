"""Metrics of generated images and tables of results."""
