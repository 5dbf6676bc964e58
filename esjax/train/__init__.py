"""Losses, optimiser, steps, checkpoints."""
