"""Text to token rows and batches. No JAX."""
