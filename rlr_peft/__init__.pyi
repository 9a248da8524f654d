from .chain.adjoint import Segment as Segment
from .chain.denoising_chain import DenoisingChain as DenoisingChain
from .config.parsing import load_config as load_config
from .estimators.base import Coverage as Coverage
from .estimators.base import Estimator as Estimator
from .estimators.objective import Rollout as Rollout
from .inference import DiffusiveChainOfThought as DiffusiveChainOfThought
from .lora.loading import load_lora as load_lora
from .prompt import Prompt as Prompt
from .rewards.base import Reward as Reward
from .training.trainer import Config as Config
from .training.trainer import Trainer as Trainer

__version__: str
