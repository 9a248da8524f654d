from .chains import LinearGaussianChain as LinearGaussianChain
from .chains import QuadraticReward as QuadraticReward
from .chains import ReplicatedChain as ReplicatedChain
from .unbiasedness import EstimatorBias as EstimatorBias
from .unbiasedness import assert_unbiased as assert_unbiased
from .unbiasedness import critical_z as critical_z
from .unbiasedness import measure_bias as measure_bias
