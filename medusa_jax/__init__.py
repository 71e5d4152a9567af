"""Medusa in JAX."""
