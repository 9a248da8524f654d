"""What is raised, and what holds the adapter back: rewards, the divergence from the base, and when to stop."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Literal

from rlr_peft.config.knob import Group, knob

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config


VLM_PREFIX = "vlm:"
OCR_PREFIX = "ocr:"
VLM_QUESTION = 'Does this image show "{prompt}"? Answer with one word, yes or no.'
VLM_ANSWERS = ("yes", "no")


def model_in(spec: str) -> str | None:
    """The Hub id or the folder in `vlm:MODEL` and `ocr:MODEL`; None in rewards of other forms."""
    return next((spec.removeprefix(prefix) for prefix in (VLM_PREFIX, OCR_PREFIX) if spec.startswith(prefix)), None)


@dataclass(frozen=True)
class RewardArguments(Group):
    """Reward: what the adapter is trained to raise"""

    reward_fn: dict[str, float] | str = knob(
        MISSING,
        "Reward: a registered name, `vlm:MODEL` (judges), `ocr:MODEL` (reads text), `package.module:callable`, "
        "`file.py:callable` or http(s) URL; or several and their weights, `{NAME: WEIGHT, ...}`.",
        found="reward",
    )
    heldout_reward_fn: tuple[str, ...] | None = knob(
        None,
        "One or more rewards that are measured and never trained on: they expose reward hacking. Early stopping "
        "watches the first.",
        found="reward",
    )
    reward_scaling: Literal["running", "first", "group", "none"] = knob(
        "running",
        "What each of several rewards is divided by: its standard deviation over past updates, that of images of the "
        "base, that within each prompt's group (GDPO; with grpo, ram, nft and awm), or nothing.",
    )
    reward_minimum: dict[str, float] | None = knob(
        None,
        "Hard minimums of rewards of reward_fn, `{NAME: MINIMUM, ...}`, in the rewards' own units.",
        found="reward",
    )
    reward_minimum_penalty: float = knob(
        10.0,
        "Penalty for each standard deviation by which a reward is below its minimum.",
        unit="standard deviations of reward",
        within="(0, 1e6]",
    )
    reward_limit: float | None = knob(
        None,
        "Highest reward (of several, their weighted sum) that is worth training for: images at or above it give no "
        "gradient; null means no limit.",
        unit="reward",
        within="[-1e9, 1e9]",
    )
    reward_dtype: Literal["auto", "fp32", "fp16", "bf16"] = knob(
        "auto", "Number format of the weights of built-in reward models; `auto` is fp16 on a GPU and fp32 on a CPU."
    )
    offload_rewards: bool = knob(
        False, "Keep built-in reward models in host memory between uses: less GPU memory, more time."
    )
    reward_model_path: dict[str, str] | None = knob(
        None,
        "Local copies of reward models, `{REPOSITORY: PATH, ...}`: a folder or file that stands for a Hub repository.",
    )
    vlm_question: str = knob(
        VLM_QUESTION,
        "What `vlm:MODEL` is asked, with `{prompt}` in the place of the prompt; `question` or `questions` in its "
        "metadata win over it.",
    )
    vlm_answers: tuple[str, ...] = knob(VLM_ANSWERS, "The good and the bad answer of `vlm:MODEL`.")
    vlm_endpoint: str | None = knob(
        None,
        "Ask the model of `vlm:MODEL` behind this OpenAI-compatible URL, `http://localhost:8000/v1`, in place of "
        "loading it; the key is read from the environment variable OPENAI_API_KEY.",
    )
    reward_server_timeout: float = knob(
        120.0,
        "Time limit of one request to a reward server, answer included; after it the server is asked again.",
        unit="seconds",
        within="(0, 86400]",
    )
    reward_server_retries: int = knob(
        5,
        "Further tries when a reward server does not answer, or answers 429 or 5xx.",
        unit="tries",
        within="[0, 1000]",
    )
    reward_server_batch_size: int = knob(
        16, "Images sent to a reward server at once.", unit="images", within="[1, 4096]"
    )
    decode_batch_size: int | None = knob(
        None,
        "Images decoded and scored at once while gradients are kept; null means train_batch_size.",
        unit="images",
        within="[1, 4096]",
    )
    decoded_frames: int | None = knob(
        None,
        "Train on the first so many frames of a video alone, for the decoder's memory; null decodes all.",
        unit="frames",
        within="[1, 10000]",
    )

    def check(self, config: "Config") -> Iterator[str]:
        trained, heldout = self.weights, self.heldout_reward_fn or ()
        for name in heldout:
            if name in trained:
                yield (
                    f"heldout_reward_fn: expected another reward than reward_fn, got {name} for both; "
                    f"a reward that is trained on cannot expose reward hacking."
                )
        if len(set(heldout)) < len(heldout):
            yield f"heldout_reward_fn: expected different rewards, got {' '.join(heldout)}; drop what is there twice."
        if not any(trained.values()) or not all(map(math.isfinite, trained.values())):
            yield (
                f"reward_fn: expected finite weights, not all 0, got {dict(trained)}; write `{{NAME: WEIGHT, ...}}`, "
                "for example `{pickscore: 1, aesthetic: 0.5}`."
            )
        for name, minimum in (self.reward_minimum or {}).items():
            if name not in trained:
                yield f"reward_minimum: expected a name of reward_fn ({', '.join(trained)}), got {name}; correct it."
            if not math.isfinite(minimum):
                yield f"reward_minimum: expected a finite number for {name}, got {minimum}; correct it."

        if self.reward_scaling == "group":
            yield from self._check_group_scaling(config)
        if len({answer.casefold() for answer in self.vlm_answers}) != 2 or len(self.vlm_answers) != 2:
            yield (
                f"vlm_answers: expected two different answers, the good one first, got {' '.join(self.vlm_answers)}; "
                "write for example `yes no`."
            )

    def _check_group_scaling(self, config: "Config") -> Iterator[str]:
        """Yields what does not go with advantages that are made of each reward by itself."""
        start = "reward_scaling: expected running, first or none with"
        if not config.estimator.normalizes_groups:
            yield f"{start} {config.estimator.estimator}, got group; use --estimator grpo, ram, nft or awm."
        if isinstance(self.reward_fn, str):
            yield f"{start} a single reward, got group; write `--reward_fn {{NAME: WEIGHT, ...}}`."
        for name in ("reward_minimum", "reward_limit"):
            if getattr(self, name) is not None:
                yield f"{start} {name}, which is of the sum, got group; drop one of the two."

    @property
    def specs(self) -> tuple[str, ...]:
        """Every reward that is trained on or measured, as it was written."""
        return (*self.weights, *(self.heldout_reward_fn or ()))

    @property
    def weights(self) -> dict[str, float]:
        """Every reward that is trained on, and its weight; 1 for a single one."""
        return self.reward_fn if isinstance(self.reward_fn, dict) else {self.reward_fn: 1.0}


@dataclass(frozen=True)
class RegularizationArguments(Group):
    """Regularisation: staying near the base, and stopping in time"""

    kl_beta: float = knob(
        0.0,
        "Weight of the divergence from the base in the objective; 0 is off.",
        unit="reward per nat",
        within="[0, 1e6]",
    )
    kl_steps: int | Literal["all"] = knob(
        4,
        "Steps drawn for one estimate of the divergence, weighted to stay unbiased.",
        unit="steps",
        within="[1, 1000]",
    )
    kl_interval: int | None = knob(
        None,
        "How often the divergence is measured where it is neither penalised nor limited; null means never.",
        unit="optimiser steps",
        within="[1, 1e9]",
    )
    kl_limit: float | None = knob(
        None,
        "Stop once the divergence from the base, averaged over ten updates, is above this; null means never.",
        unit="nats",
        within="(0, 1e9]",
    )
    early_stopping_steps: int | None = knob(
        None,
        "Stop, and go back to the best weights, once the held-out reward of this many updates is significantly below "
        "the best so far; null means never.",
        unit="optimiser steps",
        within="[5, 1e9]",
    )

    def check(self, config: "Config") -> Iterator[str]:
        asked = {"kl_beta": self.kl_beta, "kl_interval": self.kl_interval, "kl_limit": self.kl_limit}
        wanted = next((name for name, value in asked.items() if value), None)
        noiseless = config.chain.why_noiseless
        if wanted and noiseless:
            yield (
                f"{wanted}: expected noise in the chain, without which the divergence is not defined, got {noiseless}; "
                f"raise --eta with a stochastic --step_kind, or drop --{wanted}."
            )
        if self.early_stopping_steps is not None and config.reward.heldout_reward_fn is None:
            yield (
                f"early_stopping_steps: expected a heldout_reward_fn to watch, got none with "
                f"{self.early_stopping_steps}; give --heldout_reward_fn."
            )
