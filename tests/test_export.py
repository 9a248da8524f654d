"""`rlr-peft export`: diffusers reads the trained weights back, and what has no place in the format is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from rlr_peft.cli import main
from rlr_peft.lora import (
    AdapterFormatError,
    attach_lora,
    check_kohya,
    export_adapter,
    find_adapter,
    save_lora,
)
from tests.families.image_pipelines import flux, pixart_sigma, sd3, sdxl
from tests.pipelines import tiny_stable_diffusion

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def adapt(pipeline: Any, denoiser: str, **arguments: Any) -> Any:
    parameters = attach_lora(getattr(pipeline, denoiser), **{"target_modules": ATTENTION, "rank": 4, **arguments})
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def layers(denoiser: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The two matrices of every adapted layer, the scale in the second."""
    found = {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
    return {
        name: (module.lora_A[key].weight, module.lora_B[key].weight * module.scaling[key])
        for name, module in found.items()
        for key in module.lora_A
    }


MORE = ["attn.to_q", "attn.add_k_proj", "ff.net.0.proj", "proj_out"]
CASES: dict[str, tuple[Callable[[], Any], str, dict[str, Any], str]] = {
    "sd, alpha": (tiny_stable_diffusion, "unet", {"lora_alpha": 10.0}, "lora_unet_"),
    "sd, rslora": (tiny_stable_diffusion, "unet", {"use_rslora": True}, "lora_unet_"),
    "sdxl": (sdxl, "unet", {"lora_alpha": 10.0}, "lora_unet_"),
    "sd3": (sd3, "transformer", {"lora_alpha": 10.0, "target_modules": MORE}, "transformer."),
    "flux": (flux, "transformer", {"lora_alpha": 7.0, "target_modules": [*MORE, "proj_mlp"]}, "transformer."),
}


@pytest.mark.parametrize("name", CASES)
def test_it_loads_back_to_the_same_weights(name: str, tmp_path: Path) -> None:
    make, part, arguments, start = CASES[name]
    pipeline = adapt(make(), part, **arguments)
    save_lora(pipeline, tmp_path / "run")
    path = tmp_path / "loras" / "mine.safetensors"
    assert main(["export", str(tmp_path / "run"), f"--output={path}"]) == 0
    tensors, expected = load_file(path), layers(getattr(pipeline, part))
    assert all(key.startswith(start) for key in tensors)
    assert {key.rsplit(".", 1)[-1] for key in tensors} <= {"weight", "alpha"}
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    loaded = layers(getattr(pipeline, part))
    assert loaded.keys() == expected.keys() and loaded
    for key, matrices in loaded.items():
        for one, other in zip(matrices, expected[key], strict=True):
            assert torch.equal(one, other), key


def draw(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    size = {"use_resolution_binning": False} if "PixArt" in type(pipeline).__name__ else {}
    return pipeline("a red ball", num_inference_steps=2, generator=noise, output_type="pt", **size).images


def test_it_loads_back_to_the_same_images_and_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    pipeline, fresh = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    save_lora(adapt(pipeline, "unet", lora_alpha=10.0), tmp_path)
    for name in "ab":
        export_adapter(find_adapter(str(tmp_path)), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    base, expected = draw(fresh), draw(pipeline)
    fresh.load_lora_weights(load_file(tmp_path / "a"))
    torch.testing.assert_close(draw(fresh), expected, rtol=0, atol=1e-5)
    assert (base - expected).abs().max() > 1e-3


def test_what_has_no_place_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got SD3Transformer2DModel, for which diffusers has no conversion"):
        check_kohya(adapt(sd3(), "transformer", target_modules=["attn.to_q"]))
    save_lora(adapt(tiny_stable_diffusion(), "unet", use_dora=True), tmp_path / "dora")
    save_lora(adapt(pixart_sigma(), "transformer"), tmp_path / "pixart")
    save_lora(adapt(tiny_stable_diffusion(), "unet"), tmp_path / "sd")
    export_adapter(find_adapter(str(tmp_path / "sd")), tmp_path / "kohya.safetensors")
    for name, words in {
        "dora": "expected plain LoRA, got DoRA",
        "pixart": "got diffusers' format with transformer.transformer_blocks.0.attn1.to_",
        "kohya.safetensors": "got kohya's format with lora_unet_",
    }.items():
        with pytest.raises(AdapterFormatError, match=words):
            export_adapter(find_adapter(str(tmp_path / name)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
