"""A diffusion pipeline as a chain of Gaussian steps that can be sampled, replayed and differentiated."""
