"""Evaluation: base against adapter on the same prompts and seeds, and the figures that show it."""
