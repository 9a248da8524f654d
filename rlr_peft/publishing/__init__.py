"""Publishing: what a run tells the world about itself."""
