"""The training loop and what it stands on: checkpoints, metrics, interruption, optimisers."""
