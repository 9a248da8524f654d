"""How much memory a run will need, worked out on the meta device before anything is downloaded."""
