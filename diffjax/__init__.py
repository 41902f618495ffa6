"""Diffusion models in JAX and Flax as pure functions."""
