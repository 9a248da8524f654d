"""The figures of a run: image grids, base and adapter side by side, and the reward curve."""

from rlr_peft.evaluation.image_grids import image_grid, save_before_after, save_image_grid
from rlr_peft.evaluation.reward_curve import CurvePoint, save_reward_curve

__all__ = ["CurvePoint", "image_grid", "save_before_after", "save_image_grid", "save_reward_curve"]
