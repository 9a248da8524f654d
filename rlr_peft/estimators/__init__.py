"""Gradient estimators of the expected reward, written as backward segments over a chain."""
