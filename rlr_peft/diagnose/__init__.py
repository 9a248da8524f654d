"""Diagnosis: how noisy is every gradient estimator on this pipeline and reward, what does it cost, which one to take?

It knows chains, rewards and rollouts, but no pipeline: `rlr-peft diagnose` builds those and hands them over.
"""
