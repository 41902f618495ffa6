"""What is measured of samples and of samplers."""
