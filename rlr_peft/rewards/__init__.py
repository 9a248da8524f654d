"""Rewards: what an image is worth, given its prompt."""
