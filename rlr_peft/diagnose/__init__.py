"""Diagnosis: how noisy is every gradient estimator on this pipeline and reward, what does it cost, which one to take?

It knows chains, rewards and rollouts, but no pipeline: `rlr-peft diagnose` builds those and hands them over.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
