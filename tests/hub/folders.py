"""An output folder as a run leaves it, without the run."""

import json
import os
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from rlr_peft.publishing import Base, Images, License, Rewards, RunRecord, StoredCard, write_card

WEIGHTS = "pytorch_lora_weights.safetensors"
METRICS = {
    "reward_before": 0.6,
    "reward_before_se": 0.01,
    "reward_after": 0.9,
    "reward_after_se": 0.01,
    "reward_gain": 0.3,
    "reward_gain_se": 0.012,
    "n": 64,
}
RECORD = RunRecord(
    base=Base("tiny-shapes", license=License("apache-2.0")),
    rewards=Rewards("tiny-shapes"),
    config={"rank": 4, "estimator": "rlr"},
    metrics=METRICS,
    images=Images(before_after="before_after.png", gallery=[("images/validation_0.png", "a small red star")]),
)
# What a run leaves and nobody else should see.
PRIVATE = ("checkpoint-5/optimizer.pt", "logs/events", "notes.txt", "run_record.json", ".env")


def output_folder(path: Path, size: int = 200_000) -> Path:
    """A folder with an adapter of `size` random bytes, card, images, numbers, and private files beside them."""
    for name in ("before_after.png", "images/validation_0.png", *PRIVATE):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"private")
    for name in ("before_after.png", "images/validation_0.png"):
        Image.new("RGB", (8, 8)).save(path / name)
    noise = torch.frombuffer(bytearray(os.urandom(size // 4 * 4)), dtype=torch.int32)
    save_file({"unet.x.lora_A.weight": noise}, path / WEIGHTS)
    (path / "config.yaml").write_text("rank: 4\nreward_fn: http://user:secret-word@127.0.0.1/\nhub_token: null\n")
    (path / "metrics.json").write_text(json.dumps(METRICS))
    write_card(path, StoredCard(RECORD))
    return path
