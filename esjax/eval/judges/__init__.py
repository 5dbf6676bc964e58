"""Judges: who compares and rates replies, what they are asked, and how far they can be trusted."""
