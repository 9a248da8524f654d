"""kohya's format: what diffusers reads back makes the same images, and what cannot be converted is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from rlr_peft.lora import attach_lora, lora_parameters, save_kohya
from rlr_peft.lora.export import KOHYA_NAME
from tests.families.image_pipelines import sd3, sdxl
from tests.pipelines import tiny_stable_diffusion

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def adapt(pipeline: Any, denoiser: str, **arguments: Any) -> Any:
    parameters = attach_lora(getattr(pipeline, denoiser), **{"target_modules": ATTENTION, "rank": 4, **arguments})
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def draw(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    size = {"use_resolution_binning": False} if "PixArt" in type(pipeline).__name__ else {}
    return pipeline("a red ball", num_inference_steps=2, generator=noise, output_type="pt", **size).images


@pytest.mark.parametrize("make", [tiny_stable_diffusion, sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("arguments", [{"lora_alpha": 10.0}, {"use_rslora": True}], ids=["alpha", "rslora"])
def test_it_loads_back_to_the_same_images(tmp_path: Path, make: Callable[[], Any], arguments: dict[str, Any]) -> None:
    make().save_pretrained(tmp_path / "base")
    pipeline, fresh = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    adapt(pipeline, "unet", **arguments)
    path = save_kohya(pipeline, tmp_path)
    assert path == tmp_path / KOHYA_NAME
    tensors = load_file(path)
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert {name.rsplit(".", 1)[-1] for name in tensors} == {"weight", "alpha"}
    assert len(tensors) == len(lora_parameters(pipeline.unet)) * 3 // 2
    base = draw(fresh)
    fresh.load_lora_weights(path.parent, weight_name=path.name)
    expected = draw(pipeline)
    torch.testing.assert_close(draw(fresh), expected, rtol=0, atol=1e-5)
    assert (base - expected).abs().max() > 1e-3


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    first, second = (save_kohya(adapt(tiny_stable_diffusion(), "unet"), tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got SD3Transformer2DModel, for which diffusers has no conversion"):
        save_kohya(adapt(sd3(), "transformer", target_modules=["attn.to_q"]), tmp_path)
    with pytest.raises(ValueError, match="got use_dora"):
        save_kohya(adapt(tiny_stable_diffusion(), "unet", use_dora=True), tmp_path)
    assert not list(tmp_path.iterdir())
