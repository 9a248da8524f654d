"""Assembly: from a config to the pipeline, the chain, the rewards, the prompts and the optimiser of a run."""
