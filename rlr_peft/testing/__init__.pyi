from .chains import LinearGaussianChain as LinearGaussianChain
from .chains import QuadraticReward as QuadraticReward
from .unbiasedness import EstimatorBias as EstimatorBias
from .unbiasedness import assert_unbiased as assert_unbiased
from .unbiasedness import measure_bias as measure_bias
