"""What a sampled chain leaves behind: enough to replay any step exactly."""

from dataclasses import dataclass, replace

import torch

from rlr_peft.prompt import Prompt


@dataclass(frozen=True)
class Trajectory:
    """One batch of samples from noise to clean latents, in which steps count as in the paper: t = T first, t = 1 last.

    Attributes:
        prompts: the prompt of every sample, length B.
        latents: ``latents[t]`` is x_t, from the clean ``latents[0]`` to the noise ``latents[T]``; (T + 1, B, ...).
        noises: standard normal draws, (T + 1, B, ...); ``noises[t - 1]`` drives step t and ``noises[T]`` is x_T.
        stds: ``stds[t - 1]`` is the standard deviation of step t, length T.
        pred_original_samples: ``pred_original_samples[t - 1]`` is the prediction of x_0 made at step t, (T, B, ...).
        dropout_seed: seed of LoRA dropout's masks, so that a replay drops what sampling dropped.
    """

    prompts: list[Prompt]
    latents: torch.Tensor
    noises: torch.Tensor
    stds: tuple[float, ...]
    pred_original_samples: torch.Tensor
    dropout_seed: int = 0

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.stds)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return len(self.prompts)

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self.stds[t - 1]

    def noise(self, t: int) -> torch.Tensor:
        """The standard normal draw of step t, (B, ...); ``noise(T + 1)`` is the initial latents."""
        return self.noises[t - 1]

    def select(self, samples: list[int]) -> "Trajectory":
        """The trajectory of some of the samples."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in samples],
            latents=self.latents[:, samples],
            noises=self.noises[:, samples],
            pred_original_samples=self.pred_original_samples[:, samples],
        )
