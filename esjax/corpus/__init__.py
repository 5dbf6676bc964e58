"""Corpora: dialogues and replay data from files. No JAX."""
