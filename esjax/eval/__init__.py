"""Measuring replies."""
