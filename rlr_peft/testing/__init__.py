"""Chains whose gradient is known, and the proof that an estimator is unbiased on them.

For tests of one's own estimators: ``rlr_peft.testing.assert_unbiased(MyEstimator())``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
