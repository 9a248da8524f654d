"""Knobs of the gradient estimators, and of what keeps the adapter near its base."""

from dataclasses import dataclass
from typing import Literal

from rlr_peft.config.knob import knob

EstimatorName = Literal["rlr", "rlr-paper", "full-bp", "truncated-bp", "reinforce", "ddpo", "grpo", "d3po", "refl"]


@dataclass(frozen=True)
class EstimatorArguments:
    """Estimator: how the gradient of the reward is estimated (null leaves a knob to the preset)"""

    estimator: EstimatorName = knob("rlr", "Method; the knobs below override its parts.")
    fo_steps: int | Literal["auto", "random"] | None = knob(
        None,
        "Number K of last steps covered by the first-order term; `auto` measures the best K, `random` (truncated-bp) "
        "draws it for every micro-batch. With refl the step is drawn from the last K.",
        unit="steps",
        at_least=0,
        at_most=1000,
    )
    step_choice: Literal["crossing", "inverse-variance"] = knob(
        "crossing",
        "What `fo_steps: auto` measures: one K, or a weight for every step that mixes first and half order.",
    )
    ho_length: int | Literal["auto"] | None = knob(
        None,
        "Length h of a half-order block; `auto` derives it from nfe_budget and memory_budget.",
        unit="steps",
        at_least=1,
        at_most=1000,
    )
    ho_blocks: int | Literal["all"] | None = knob(
        None,
        "Half-order blocks (with ddpo, grpo and d3po: trained steps) drawn for each micro-batch, weighted to stay "
        "unbiased; `all` takes every remaining step, 0 leaves the half order out.",
        unit="blocks",
        at_least=0,
        at_most=1000,
    )
    ho_start: Literal["uniform", "gradient-norm", "window"] | None = knob(
        None, "How the start of a half-order block is drawn: evenly, by running gradient norms, or from ho_window."
    )
    ho_window: tuple[int | str, ...] | None = knob(
        None,
        "From where `ho_start: window` draws: first and last step `a b`, counted from 1 (clean) to T (noise); a stage "
        "of the Chain-of-Thought by name; or `auto` for the stage with the largest measured gradient energy.",
        unit="steps",
    )
    zo: Literal["none", "one-point", "two-point"] | None = knob(
        None, "Zeroth-order term on the steps that no other term covers."
    )
    zo_scale: float = knob(
        0.01,
        "Standard deviation s of the zeroth-order parameter perturbation.",
        unit="LoRA weight units",
        above=0,
        at_most=1000,
    )
    zo_samples: int = knob(
        1, "Parameter perturbations drawn for each update.", unit="perturbations", at_least=1, at_most=10_000
    )
    black_box_steps: int | None = knob(
        None,
        "Number of last steps covered by reward differences where the reward has no gradient; 0 is off, null (with "
        "rlr) as many as about double the cost.",
        unit="steps",
        at_least=0,
        at_most=1000,
    )
    state_baseline: bool = knob(
        False, "Take the reward of the predicted image off the score terms' advantages: one reward call per step used."
    )
    antithetic: bool = knob(
        False, "Sample in neighbouring pairs with mirrored noises (groups of 4 or more, an even number)."
    )
    fo_coefficient: float = knob(
        1.0, "Factor of the first-order term; not 1 is biased by choice.", unit="factor", at_least=0, at_most=1e6
    )
    ho_coefficient: float = knob(
        1.0, "Factor of the score terms; not 1 is biased by choice.", unit="factor", at_least=0, at_most=1e6
    )
    zo_coefficient: float = knob(
        1.0, "Factor of the zeroth-order term; not 1 is biased by choice.", unit="factor", at_least=0, at_most=1e6
    )
    normalize_rewards: bool = knob(
        False, "Divide the whole gradient by the running standard deviation of the rewards: all terms alike."
    )
    inner_epochs: int | None = knob(
        None,
        "Optimiser steps of ddpo, grpo and d3po on the same samples.",
        unit="optimiser steps",
        at_least=1,
        at_most=1000,
    )
    clip_range: float = knob(
        0.2,
        "Density ratios of ddpo and grpo are clipped to 1 minus to 1 plus this.",
        unit="ratio of a step",
        above=0,
        at_most=1e6,
    )
    advantage_clip: float = knob(
        5.0,
        "Advantages of ddpo and grpo are clipped to plus or minus this.",
        unit="standard deviations",
        above=0,
        at_most=1e6,
    )
    per_prompt_stat_tracking_buffer_size: int = knob(
        32,
        "Latest rewards of a prompt from which ddpo takes mean and deviation.",
        unit="rewards",
        at_least=2,
        at_most=10**6,
    )
    per_prompt_stat_tracking_min_count: int = knob(
        16,
        "Rewards that a prompt needs for statistics of its own; before, the batch's are used.",
        unit="rewards",
        at_least=2,
        at_most=10**6,
    )
    dpo_beta: float = knob(0.1, "Strength of d3po's pull towards the base model.", unit="1 / nat", above=0, at_most=1e6)
    calibration_interval: int = knob(
        25,
        "How often the per-step variances behind `fo_steps: auto` are measured again.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )
    calibration_samples: int = knob(
        16, "Images sampled for one measurement of the per-step variances.", unit="images", at_least=2, at_most=100_000
    )
    calibration_decay: float = knob(
        0.5,
        "Weight of the past in the running means of the per-step variances.",
        unit="fraction",
        at_least=0,
        below=1,
    )
    nfe_budget: float | None = knob(
        None,
        "Compute that `ho_length: auto` may spend.",
        unit="denoiser evaluations per sample and optimiser step",
        above=0,
        at_most=1e9,
    )
    memory_budget: float | None = knob(
        None,
        "Peak memory that `ho_length: auto` may use, by the paper's rule for a tape of h steps.",
        unit="GB",
        above=0,
        at_most=1e6,
    )
    ho_step_memory: float | None = knob(
        None, "Memory of one half-order step on the tape, for memory_budget.", unit="GB", above=0, at_most=1e6
    )
    zo_step_memory: float | None = knob(
        None, "Memory of one zeroth-order step, for memory_budget.", unit="GB", at_least=0, at_most=1e6
    )


@dataclass(frozen=True)
class RegularizationArguments:
    """Regularisation: staying near the base, and stopping in time"""

    kl_beta: float = knob(
        0.0,
        "Weight of the divergence from the base in the objective; 0 is off.",
        unit="reward per nat",
        at_least=0,
        at_most=1e6,
    )
    kl_steps: int | Literal["all"] = knob(
        4,
        "Steps drawn for one estimate of the divergence, weighted to stay unbiased.",
        unit="steps",
        at_least=1,
        at_most=1000,
    )
    kl_interval: int | None = knob(
        None,
        "How often the divergence is measured where it is neither penalised nor limited; null means never.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )
    kl_limit: float | None = knob(
        None,
        "Training stops where the divergence from the base, averaged over ten updates, passes this.",
        unit="nats",
        above=0,
        at_most=1e9,
    )
    early_stopping_steps: int | None = knob(
        None,
        "Training stops, and goes back to its best weights, where the held-out reward of so many updates is "
        "significantly below the best so far; null means never.",
        unit="optimiser steps",
        at_least=5,
        at_most=10**9,
    )
