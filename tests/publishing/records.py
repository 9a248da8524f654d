"""Records of runs for the tests of cards."""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from rlr_peft.publishing import (
    Base,
    ImagePair,
    Images,
    License,
    Prompts,
    Rewards,
    RunRecord,
    Sampling,
    StoredCard,
    write_card,
)

METRICS = {
    "reward_before": 0.6123,
    "reward_before_se": 0.0123,
    "reward_after": 0.91,
    "reward_after_se": 0.0061,
    "reward_gain": 0.2977,
    "reward_gain_se": 0.0131,
    "reward_win_rate": 0.8125,
    "heldout_before": 0.6,
    "heldout_before_se": 0.01,
    "heldout_after": 0.8,
    "heldout_after_se": 0.01,
    "heldout_gain": 0.2,
    "heldout_gain_se": 0.012,
    "heldout_win_rate": 0.75,
    "n": 256,
    "seconds": 222.0,
    "peak_memory_mb": 1912.3,
    "denoiser_evaluations": 34000,
}
CONFIG = {
    "rank": 4,
    "estimator": "rlr",
    "lora_alpha": None,
    "validation_prompt": ["a ``` b", "c: d"],
    "step_kind": "ancestral",
    "eta": 1.0,
    "num_images_per_prompt": 4,
    "lr_scheduler": "constant",
    "max_grad_norm": 1.0,
    "mixed_precision": "no",
    "seed": 3,
}
TRAINING = {
    "terms": "first order",
    "steps": 10,
    "guidance_scale": 4.0,
    "samples": 16,
    "processes": 2,
    "learning_rate": 0.002,
    "weights": 25_088,
    "first_order": [3, 6.5],
    "chain_of_thought": None,
    "reward_decoder": None,
    "stopped_early": None,
    "verdict": None,
    "coverage": "Every step has weight 1.",
}
MINIMAL = RunRecord(Base("CompVis/stable-diffusion-v1-4"), Rewards("jpeg-compressibility"), {"rank": 4})
FULL = RunRecord(
    base=Base("tiny-shapes", tags=["stable-diffusion", "lora"], license=License("apache-2.0")),
    rewards=Rewards("tiny-shapes", heldout=["tiny-shapes-heldout"]),
    config=CONFIG,
    metrics=METRICS,
    sampling=Sampling(words="20 steps, eta 0", call={"num_inference_steps": 2, "guidance_scale": 4.0}),
    prompts=Prompts(
        shown=[f'prompt "{index}" with \\ and \'' for index in range(10)], count=12_000, evaluation="unseen prompts"
    ),
    images=Images(
        before_after="before_after.png",
        reward_curve="reward_curve.png",
        gallery=[("images/one.png", "a small red star"), ("images/two.png", "a ring: blue")],
        pairs=[ImagePair("a | b", "images/base_0.png", "images/adapter_0.png", 0.4, 0.75)],
    ),
    training=TRAINING,
    machine={
        "command": "accelerate launch train_rlr_lora.py --config configs/tiny_shapes.yaml",
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "commit": "abc123",
    },
)


def changed(record: RunRecord, **changes: Any) -> RunRecord:
    """The record with other values: of a group, those that a mapping names; anything else as a whole."""
    new = {}
    for name, value in changes.items():
        old = getattr(record, name)
        if is_dataclass(old) and isinstance(value, Mapping):
            value = replace(old, **value)  # type: ignore[type-var]
        elif name in ("training", "machine"):
            value = {**old, **value} if value else value
        new[name] = value
    return replace(record, **new)


def write(folder: Path, record: RunRecord, template: str | None = None, extra_text: str | None = None) -> str:
    """Writes the card; returns its text."""
    return write_card(folder, StoredCard(record, template, extra_text)).read_text()
