"""The options that save memory: the same numbers from other places, and refusals before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.attention_dispatch import attention_backend

from rlr_peft.build import (
    WITHOUT_GPU,
    build_run,
    compile_denoisers,
    load_pipeline,
    prepare_machine,
    set_attention_backend,
)
from rlr_peft.chain import (
    DenoisingChain,
    ModelOffload,
    Segment,
    default_lora_targets,
    family_of,
    offload_models,
    run,
    working_device,
)
from rlr_peft.config import ConfigError, ModelArguments, load_config
from rlr_peft.lora import attach_lora
from rlr_peft.training import finish
from tests.families.image_pipelines import flux
from tests.pipelines import chain_over, tiny_stable_diffusion
from tests.training.runs import config_file, start, train_here

CPU = torch.device("cpu")
PROMPTS = ["a", "b"]


def frozen_pipeline() -> Any:
    pipeline = tiny_stable_diffusion()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def chain_of(pipeline: Any, **options: Any) -> DenoisingChain:
    return chain_over(pipeline, num_inference_steps=3, resolution=16, **options)


def adapted(pipeline: Any) -> Any:
    parameters = attach_lora(pipeline.unet, target_modules=default_lora_targets(family_of(pipeline), pipeline.unet))
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.1)
    return pipeline


def step_of(chain: DenoisingChain) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images and the adapter's gradient of one update by hand: sample, decode, pull back through all steps."""
    trajectory = chain.sample(PROMPTS, [0, 1])
    latents = trajectory.latents[0].clone().requires_grad_()
    with torch.enable_grad():
        images = chain.decode(latents, PROMPTS)
        (cotangent,) = torch.autograd.grad(images[:, 0].sum(), latents)
    run(chain, trajectory, Segment("term", range(1, 4), cotangent))
    return images.detach(), [parameter.grad.clone() for parameter in chain.parameters if parameter.grad is not None]


# --- offload ----------------------------------------------------------------------------------------------------------


def test_offloaded_models_compute_the_same_and_only_one_is_at_work() -> None:
    expected_images, expected = step_of(chain_of(adapted(frozen_pipeline())))
    pipeline = frozen_pipeline()
    hooks = offload_models(pipeline, CPU)
    chain = chain_of(adapted(pipeline))
    seen: list[set[str]] = []

    def look(module: torch.nn.Module, args: Any) -> None:
        seen.append({type(hook._module).__name__ for hook in hooks if hook.resident_bytes})

    for module in (pipeline.unet.conv_in, pipeline.vae.decoder.conv_in):
        module.register_forward_pre_hook(look)
    images, gradients = step_of(chain)
    assert torch.equal(images, expected_images)
    assert len(gradients) == len(expected) and all(map(torch.equal, gradients, expected))
    assert {name for names in seen for name in names} == {"UNet2DConditionModel", "AutoencoderKL"}
    assert all(len(names) == 1 for names in seen)


def test_frozen_weights_come_back_to_where_they_were_and_trained_ones_stay() -> None:
    pipeline = frozen_pipeline()
    hooks = offload_models(pipeline, CPU)
    chain = chain_of(adapted(pipeline))
    unet = next(hook for hook in hooks if hook._module is pipeline.unet)
    assert isinstance(unet, ModelOffload) and working_device(pipeline.unet) == CPU
    frozen = {name: p.data_ptr() for name, p in pipeline.unet.named_parameters() if not p.requires_grad}
    trajectory = chain.sample(PROMPTS, [0, 1])
    trained = [parameter.data_ptr() for parameter in chain.parameters]
    total = sum(p.nbytes for p in pipeline.unet.parameters() if not p.requires_grad)
    assert unet.resident_bytes == total + sum(buffer.nbytes for buffer in pipeline.unet.buffers())
    away = {name: p.data_ptr() for name, p in pipeline.unet.named_parameters() if not p.requires_grad}
    assert not set(away.values()) & set(frozen.values())
    chain.decode(trajectory.latents[0], PROMPTS)
    assert unet.resident_bytes == 0
    assert {name: p.data_ptr() for name, p in pipeline.unet.named_parameters() if not p.requires_grad} == frozen
    assert [parameter.data_ptr() for parameter in chain.parameters] == trained


def test_offloaded_text_encoders_are_not_moved_when_the_base_is_loaded(workplace: Path) -> None:
    arguments = ModelArguments(str(workplace / "base"), offload_text_encoders=True)
    pipeline: Any = load_pipeline(arguments, torch.device("meta"))
    assert pipeline.unet.device.type == pipeline.vae.device.type == "meta" and pipeline.text_encoder.device == CPU
    assert pipeline.config["text_encoder"] == ("transformers", "CLIPTextModel")


# --- what needs a GPU -------------------------------------------------------------------------------------------------


@pytest.fixture
def four_bits(tmp_path: Path) -> str:
    path = tmp_path / "nf4.json"
    path.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    return str(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_quantised_base_is_refused_without_gpu_before_any_download(workplace: Path, four_bits: str) -> None:
    # The base does not exist: whoever looked for it would fail with another message, after retries.
    config = config_file(workplace, workplace / "refused", bnb_quantization_config_path=four_bits)
    process = start(config, "--pretrained_model_name_or_path", "nobody/has-this", "--prompt_path", "tiny-shapes/train")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"error: {WITHOUT_GPU}" in output
    assert "expected a GPU" in WITHOUT_GPU and "leave --bnb_quantization_config_path out" in WITHOUT_GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_offload_is_refused_without_gpu(workplace: Path) -> None:
    config = load_config(["--config", str(config_file(workplace, workplace / "offloaded", offload=True))])
    with pytest.raises(ConfigError, match="offload: expected a GPU"):
        build_run(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes through diffusers needs a GPU")
@pytest.mark.parametrize("offload", [False, True])
def test_a_quantised_base_trains_on_a_gpu(workplace: Path, four_bits: str, offload: bool) -> None:
    config = config_file(
        workplace,
        workplace / f"quantised-{offload}",
        bnb_quantization_config_path=four_bits,
        mixed_precision="bf16",
        offload=offload,
        max_train_steps=2,
    )
    finished, progress = train_here(config)
    assert progress.step == 2
    assert any(type(module).__name__ == "Linear4bit" for module in finished.pipeline.unet.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload spares GPU memory")
def test_offloaded_training_on_a_gpu_gives_the_same_weights(workplace: Path) -> None:
    weights = []
    for offload in (False, True):
        config = config_file(workplace, workplace / f"gpu-offload-{offload}", offload=offload, max_train_steps=2)
        finished, _ = train_here(config)
        weights.append([parameter.detach().cpu() for parameter in finished.chain.parameters])
    assert all(map(torch.equal, *weights))


# --- the tiny VAE -----------------------------------------------------------------------------------------------------


def tiny_vae(latent_channels: int = 4) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=latent_channels,
    )


def test_the_reward_sees_the_tiny_vae_and_everyone_else_the_real_one(workplace: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tiny_vae().save_pretrained(workplace / "tiny-vae")
    config = config_file(
        workplace, workplace / "tiny-run", pretrained_tiny_vae_name_or_path=str(workplace / "tiny-vae")
    )
    built, progress = train_here(config, "--max_train_steps", "2", "--fo_steps", "4")
    assert progress.step == 2
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    own = built.pipeline.vae
    tiny = AutoencoderTiny.from_pretrained(workplace / "tiny-vae")
    with torch.no_grad():
        decoded = built.chain.decode(latents, ["a"])
        expected = (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(decoded, expected, atol=1e-6)
        assert built.pipeline.vae is own and built.pipeline.config["vae"] == ("diffusers", "AutoencoderKL")
        looked_at = chain_over(built.pipeline, num_inference_steps=2, resolution=16).decode(latents, ["a"])
        expected = (own.decode(latents / own.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(looked_at, expected, atol=1e-6)


def test_the_card_says_that_the_tiny_vae_biases_the_reward(workplace: Path) -> None:
    tiny_vae().save_pretrained(workplace / "tiny-vae-card")
    config = config_file(
        workplace, workplace / "card-run", pretrained_tiny_vae_name_or_path=str(workplace / "tiny-vae-card")
    )
    finished, progress = train_here(config, "--max_train_steps", "1")
    finish(finished, progress, None)
    card = (workplace / "card-run" / "README.md").read_text()
    assert "small decoder `tiny-vae-card`, so its gradient is biased" in card


def test_a_tiny_vae_of_another_family_is_refused(workplace: Path) -> None:
    tiny_vae(latent_channels=16).save_pretrained(workplace / "wrong-tiny-vae")
    config = config_file(
        workplace, workplace / "wrong-run", pretrained_tiny_vae_name_or_path=str(workplace / "wrong-tiny-vae")
    )
    with pytest.raises(ConfigError, match=r"16 latent channels.*AutoencoderKL with 4.*taesd"):
        build_run(load_config(["--config", str(config)]))


# --- the VAE in tiles -------------------------------------------------------------------------------------------------


def test_the_reward_sees_tiles_and_everyone_else_the_whole_image(workplace: Path) -> None:
    config = config_file(workplace, workplace / "tiles-run", resolution=64, vae_tile_size=32)
    built, progress = train_here(config, "--max_train_steps", "1")
    assert progress.step == 1
    vae, tiled = built.pipeline.vae, built.chain.reward_decoder
    assert tiled is not vae and not vae.use_tiling
    side = 64 // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for chain, decoder in ((built.chain, tiled), (built.chain.at(whole=True), vae)):
            expected = (decoder.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            assert torch.allclose(chain.decode(latents, ["a"]), expected, atol=1e-6)
    finish(built, progress, None)
    assert "decoded in tiles of 32 pixels, which differ a little" in (workplace / "tiles-run" / "README.md").read_text()


# --- attention and compilation ----------------------------------------------------------------------------------------


def test_an_attention_backend_reaches_every_layer_of_a_transformer() -> None:
    pipeline = flux()
    with attention_backend():  # diffusers keeps the choice for the whole process; this gives the present one back
        set_attention_backend(pipeline, "_native_math")
    processors = [m.processor for m in pipeline.transformer.modules() if hasattr(m, "processor")]
    assert processors and all(processor._attention_backend == "_native_math" for processor in processors)
    with pytest.raises(ValueError, match=r"expected one of .*native.*got fastest"):
        set_attention_backend(pipeline, "fastest")


def test_a_unet_offers_no_attention_backend(workplace: Path) -> None:
    arguments = ModelArguments(str(workplace / "base"), attention_backend="native")
    with pytest.raises(ValueError, match="no choice for UNet2DConditionModel"):
        load_pipeline(arguments, CPU)


def test_compilation_marks_the_repeated_blocks_and_can_be_switched_off() -> None:
    pipeline = adapted(tiny_stable_diffusion())
    chain = chain_of(pipeline)
    before = chain.sample(PROMPTS, [0, 1]).latents[0]
    compile_denoisers([pipeline.unet])
    blocks = [m for m in pipeline.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    with torch.compiler.set_stance("force_eager"):  # as the check of the saved adapter does
        assert torch.equal(chain.sample(PROMPTS, [0, 1]).latents[0], before)


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_gpu_gets_no_attention_of_cudnn() -> None:
    """The backward pass of FLUX in bf16 fails with it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        prepare_machine(ModelArguments("tiny-shapes"), CPU)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        prepare_machine(ModelArguments("tiny-shapes"), torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_full_determinism_leaves_only_kernels_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU two runs are then equal: `benchmarks/real_run.py --case tiny-deterministic`."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        prepare_machine(ModelArguments("tiny-shapes", full_determinism=True), CPU)
        assert torch.get_deterministic_debug_mode() == 2  # an operation without such a kernel is an error
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
