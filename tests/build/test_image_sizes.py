"""A size that the base cannot draw is refused by its small files, before anything is loaded."""

import json
from pathlib import Path

import pytest

from rlr_peft.build import build_run
from rlr_peft.config import ConfigError, load_config

CLASSES = {
    "unet": ("StableDiffusionPipeline", "UNet2DConditionModel"),
    "transformer": ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
}


def base_without_weights(folder: Path, denoiser: str, levels: int) -> str:
    (folder / "vae").mkdir()
    index = {
        "_class_name": CLASSES[denoiser][0],
        denoiser: ["diffusers", CLASSES[denoiser][1]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8] * levels}
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return str(folder)


@pytest.mark.parametrize(
    ("knobs", "levels", "denoiser", "message"),
    [
        (
            {"resolution": 63},
            4,
            "unet",
            "resolution: expected a multiple of 8 pixels, as StableDiffusionPipeline",
        ),
        ({"resolution": 63}, 2, "unet", "here, got 63; take 56 or 64."),
        ({"height": 64, "width": 40}, 5, "unet", "width: expected a multiple of 16 pixels"),
        ({"evaluation_resolution": 6}, 4, "unet", "evaluation_resolution: .*got 6; take 8."),
        ({"resolution": 63}, 4, "transformer", "multiple of 8 pixels, as StableDiffusion3Pipeline needs"),
        ({"resolution": 64}, 4, "unet", "cannot be loaded"),
        ({"resolution": 6}, 2, "transformer", "cannot be loaded"),
    ],
)
def test_sizes(tmp_path: Path, knobs: dict[str, int], levels: int, denoiser: str, message: str) -> None:
    base = base_without_weights(tmp_path, denoiser, levels)
    words = {"pretrained_model_name_or_path": base, "output_dir": tmp_path / "out", "prompt_path": "tiny-shapes/train"}
    words |= {"reward_fn": "jpeg-compressibility", **knobs}
    config = load_config([f"--{name}={value}" for name, value in words.items()])
    with pytest.raises(ConfigError, match=message):
        build_run(config)
