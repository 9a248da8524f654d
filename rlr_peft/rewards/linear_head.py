"""The head of the aesthetic predictor and of ImageReward: five linear layers with nothing but dropout in between."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rlr_peft.rewards.errors import RewardError
from rlr_peft.rewards.model_files import check_keys

_LAYER = re.compile(r"layers\.(\d+)\.weight")


class LinearHead(nn.Module):
    """Linear layers one after the other, (B, D) -> (B,); their numbers are those of the checkpoint.

    Args:
        reward_name: named in errors.
        path: of the checkpoint, named in errors.
        weights: `layers.N.weight` (out, in) and `layers.N.bias` (out,).
        width: D, of the features that it will get.

    Raises:
        RewardError: weights are missing or unknown, or for features of another width.
    """

    def __init__(self, reward_name: str, path: Path, weights: Mapping[str, Tensor], width: int) -> None:
        super().__init__()
        numbers = sorted(int(match[1]) for match in map(_LAYER.fullmatch, weights) if match)
        self.layers = nn.ModuleDict(
            {
                str(n): nn.Linear(weights[f"layers.{n}.weight"].shape[1], weights[f"layers.{n}.weight"].shape[0])
                for n in numbers
            }
        )
        loaded = self.load_state_dict(dict(weights), strict=False)
        check_keys(
            reward_name, path, loaded.missing_keys or ([] if numbers else ["layers.0.weight"]), loaded.unexpected_keys
        )
        expected = self.layers[str(numbers[0])].in_features
        if expected != width:
            raise RewardError(
                f"reward '{reward_name}': {path} is a head for features of {expected} numbers, but the model before it "
                f"gives {width}; take the head and the model that belong together"
            )

    def forward(self, features: Tensor) -> Tensor:
        """(B,) in the features' dtype."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)
