"""A size that the base cannot draw is refused by its small files, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlr_peft.build import build_run
from rlr_peft.config import ConfigError, load_config

BASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sd": ("StableDiffusionPipeline", "unet", "UNet2DConditionModel", {}),
    "sd3": ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel", {"patch_size": 2, "in_channels": 16}),
    "flux": ("FluxPipeline", "transformer", "FluxTransformer2DModel", {"patch_size": 1, "in_channels": 64}),
    "z-image": ("ZImagePipeline", "transformer", "ZImageTransformer2DModel", {"all_patch_size": [2]}),
}


def base_without_weights(folder: Path, base: str, levels: int) -> str:
    pipeline_class, denoiser, denoiser_class, settings = BASES[base]
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8] * levels, "latent_channels": 16}
    index = {
        "_class_name": pipeline_class,
        denoiser: ["diffusers", denoiser_class],
        "vae": ["diffusers", vae["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, config in ((denoiser, settings), ("vae", vae)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("knobs", "levels", "base", "message"),
    [
        (
            {"resolution": 63},
            4,
            "sd",
            "resolution: expected a multiple of 8 pixels, as StableDiffusionPipeline",
        ),
        ({"resolution": 63}, 2, "sd", "here, got 63; take 56 or 64."),
        ({"height": 64, "width": 40}, 5, "sd", "width: expected a multiple of 16 pixels"),
        ({"evaluation_resolution": 6}, 4, "sd", "evaluation_resolution: .*got 6; take 8."),
        (
            {"resolution": 72},
            4,
            "sd3",
            "multiple of 16 pixels, as StableDiffusion3Pipeline needs here, got 72; take 64 or",
        ),
        ({"resolution": 72}, 4, "flux", "multiple of 16 pixels, as FluxPipeline needs"),
        ({"resolution": 72}, 4, "z-image", "multiple of 16 pixels, as ZImagePipeline needs"),
        ({"resolution": 64}, 4, "sd", "cannot be loaded"),
        ({"resolution": 6}, 1, "sd3", "cannot be loaded"),
    ],
)
def test_sizes(tmp_path: Path, knobs: dict[str, int], levels: int, base: str, message: str) -> None:
    folder = base_without_weights(tmp_path, base, levels)
    words = {
        "pretrained_model_name_or_path": folder,
        "output_dir": tmp_path / "out",
        "prompt_path": "tiny-shapes/train",
    }
    words |= {"reward_fn": "jpeg-compressibility", **knobs}
    config = load_config([f"--{name}={value}" for name, value in words.items()])
    with pytest.raises(ConfigError, match=message):
        build_run(config)
