"""Diagnoses of a linear chain, of a chaotic one and of a reward without gradient."""

import pytest

from rlr_peft.diagnose import Diagnosis
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.diagnose.diagnoses import WavyReward, chaotic_chain, diagnosis_of


@pytest.fixture(scope="session")
def linear() -> Diagnosis:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    return diagnosis_of(chain, QuadraticReward(chain), 32)


@pytest.fixture(scope="session")
def chaotic() -> Diagnosis:
    chain = chaotic_chain()
    return diagnosis_of(chain, WavyReward(chain), 96)


@pytest.fixture(scope="session")
def without_gradient() -> Diagnosis:
    chain = LinearGaussianChain(num_steps=6, last_std=0.0)
    return diagnosis_of(chain, QuadraticReward(chain, differentiable=False), 32, differentiable=False)
