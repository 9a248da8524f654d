"""Pipelines that no row knows either work as they are, or say what could not be determined and which option sets it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from rlr_peft.chain import default_lora_targets, family_of
from rlr_peft.lora import attach_lora, save_lora, verify_lora_reloads
from tests.families.image_pipelines import flow_vae, flux2_klein
from tests.families.table import load
from tests.families.text_encoders import WIDTH, t5_encoder, t5_tokenizer
from tests.pipelines import chain_over

OPTIONS = {"height": 16, "width": 16, "max_sequence_length": 32, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class without a row."""
    folder = tmp_path_factory.mktemp("chroma")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flow_vae(4),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
            transformer=ChromaTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux2_klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class without a row, whose call takes and returns latents in another form than its steps do."""
    folder = tmp_path_factory.mktemp("klein")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        flux2_klein().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fixture", ["chroma", "flux2_klein_folder"])
def test_an_unknown_class_is_driven_trained_and_saved(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    pipeline = load(str(folder))
    family = family_of(pipeline)
    assert family.name == "generic" and family.denoisers == ("transformer",)
    with pytest.raises(ValueError, match=f"expected a supported pipeline, got {type(pipeline).__name__}, where it"):
        chain_over(pipeline, detach_negative=True, **OPTIONS)
    chain = chain_over(pipeline, eta=0.0, **OPTIONS)
    trajectory = chain.sample(["a red ball"], [5])
    with torch.no_grad():
        images = chain.decode(trajectory.latents[0], ["a red ball"])
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(prompt="a red ball", generator=generator, output_type="pt", **OPTIONS).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)

    targets = default_lora_targets(family, pipeline.transformer)
    assert {"to_q", "to_out.0", "add_q_proj"} <= set(targets)
    parameters = attach_lora(pipeline.transformer, target_modules=targets)
    chain = chain_over(pipeline, parameters=parameters, **OPTIONS)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05
    step = chain.replay(chain.sample(["a red ball"], [5]), 2)
    gradients = torch.autograd.grad(step.mean.square().sum(), parameters, allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    save_lora(pipeline, tmp_path)

    def render(pipeline: DiffusionPipeline) -> torch.Tensor:
        chain = chain_over(pipeline, eta=0.0, **OPTIONS)
        return chain.decode(chain.sample(["sky"], [1]).latents[0], ["sky"])

    verify_lora_reloads(pipeline, tmp_path, render)


def test_an_unknown_noising_path_names_its_option(chroma: Path) -> None:
    pipeline = load(str(chroma))
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match=r"noising path of EDMEulerScheduler.*--scheduler_type to diffusion or flow"):
        chain_over(pipeline, **OPTIONS)
    chain = chain_over(pipeline, scheduler_type="flow", **OPTIONS)
    assert chain.solver == "Euler" and chain.std(1) == 0


def test_unknown_targets_and_denoisers_name_their_options(chroma: Path) -> None:
    pipeline = load(str(chroma))
    with pytest.raises(ValueError, match=r"LoRA targets of Conv2d: none of its.*Set --lora_layers"):
        default_lora_targets(family_of(pipeline), pipeline.vae.decoder.conv_in)
    with pytest.raises(ValueError, match=r"denoiser of ChromaPipeline: expected unet, got.*transformer.*--denoiser"):
        chain_over(pipeline, denoisers=["unet"], **OPTIONS)


def test_what_breaks_inside_an_unknown_class_is_passed_on(chroma: Path) -> None:
    with pytest.raises(ValueError, match=r"ChromaPipeline is not among.*stopped with.*--height and --width"):
        chain_over(load(str(chroma)), **{**OPTIONS, "max_sequence_length": 9999})


def test_a_pipeline_without_prompts_is_refused() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(ValueError, match="DDPMPipeline cannot be driven as a chain: its call takes no `prompt`"):
        chain_over(DDPMPipeline(unet, DDPMScheduler()))


def test_options_that_a_pipeline_does_not_take_are_refused(folder_of: Callable[[str], str]) -> None:
    for name, options, message in (
        ("sd-epsilon", {"num_frames": 4}, "StableDiffusionPipeline takes no num_frames: leave --num_frames out"),
        ("sdxl", {"true_cfg_scale": 4.0}, "takes no true_cfg_scale"),
        ("qwen-image", {"true_cfg_scale": 4.0, "guidance_scale": 4.0}, "one guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            chain_over(load(folder_of(name)), **options)
