import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.real_size import quantize
from rlr_peft.lora import (
    WEIGHT_NAME,
    AdapterMismatchError,
    adapter_disabled,
    attach_lora,
    diffusers_loads,
    lora_parameters,
    lora_size,
    save_lora,
    verify_lora_reloads,
)
from tests.pipelines import tiny_stable_diffusion

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
VARIANTS: dict[str, dict[str, Any]] = {
    "alpha = rank": {"target_modules": ATTENTION},
    "alpha = 2 rank": {"target_modules": ATTENTION, "lora_alpha": 8.0},
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True, "rank": 8, "lora_alpha": 3.0},
    "DoRA": {"target_modules": ATTENTION, "use_dora": True},
    "convolutions and projections": {"target_modules": ["conv1", "proj_in", "time_emb_proj", "conv_shortcut"]},
    "DoRA on convolutions": {"target_modules": ["conv1", "to_q"], "use_dora": True, "lora_alpha": 6.0},
    "dropout": {"target_modules": ATTENTION, "lora_dropout": 0.5},
    "kaiming": {"target_modules": ATTENTION, "init_lora_weights": "kaiming"},
    "orthogonal": {"target_modules": ["to_q", "conv2"], "init_lora_weights": "orthogonal"},
}


def render(pipeline: Any) -> Tensor:
    output = pipeline(
        ["a red ball"],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return torch.from_numpy(output.images)


def train(denoiser: nn.Module) -> None:
    """Stands for training: every parameter moves, lora_B away from zero."""
    generator = torch.Generator().manual_seed(7)
    for parameter in lora_parameters(denoiser).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def trained_pipeline(dtype: torch.dtype = torch.float32, **arguments: Any) -> StableDiffusionPipeline:
    pipeline = tiny_stable_diffusion(dtype=dtype)
    attach_lora(pipeline.unet, **{"target_modules": ATTENTION, **arguments})
    train(pipeline.unet)
    return pipeline


@pytest.fixture(scope="session")
def base_image() -> Tensor:
    return render(tiny_stable_diffusion())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_adapter_loads_exactly(variant: str, dtype: torch.dtype, tmp_path: Path, base_image: Tensor) -> None:
    pipeline = trained_pipeline(dtype, **VARIANTS[variant])
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(pipeline.unet).items()}
    pipeline.unet.train()
    path = save_lora(pipeline, tmp_path / "adapter")
    verify_lora_reloads(pipeline, tmp_path / "adapter", render)
    fresh = tiny_stable_diffusion(dtype=dtype)
    fresh.load_lora_weights(tmp_path / "adapter")

    assert [file.name for file in (tmp_path / "adapter").iterdir()] == [WEIGHT_NAME]
    assert path.stat().st_mode & 0o077 == (tmp_path / "adapter").stat().st_mode & 0o066
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert len(load_file(path)) == len(before)
    # the comparison has left the trained weights in full precision and the mode alone
    for name, parameter in lora_parameters(pipeline.unet).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    assert pipeline.unet.training
    assert (render(fresh) - base_image).abs().max() > 0.01  # the adapter does something


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_adapter_is_proved_beside_the_trained_one(variant: str, tmp_path: Path) -> None:
    pipeline = trained_pipeline(**VARIANTS[variant])
    pipeline.unet.eval()
    before = {name: (value.detach().clone(), value.requires_grad) for name, value in pipeline.unet.named_parameters()}
    image = render(pipeline)
    save_lora(pipeline, tmp_path)
    active = []

    def watched(pipeline: StableDiffusionPipeline) -> Tensor:
        active.append(pipeline.unet.active_adapters())
        return render(pipeline)

    assert verify_lora_reloads(pipeline, tmp_path, watched) == 0
    assert active[0] == ["default"] != active[1] and len(active[1]) == 1, "one after the other, each alone"
    after = dict(pipeline.unet.named_parameters())
    assert after.keys() == before.keys() and pipeline.unet.peft_config.keys() == {"default"}
    for name, (value, requires_grad) in before.items():
        assert torch.equal(after[name], value) and after[name].requires_grad == requires_grad
    assert torch.equal(render(pipeline), image)


def test_the_file_holds_native_keys_and_eight_metadata_keys_only(tmp_path: Path) -> None:
    path = save_lora(trained_pipeline(lora_alpha=8.0), tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    assert metadata.keys() == {"format", "lora_adapter_metadata"}
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "unet.r": 4,
        "unet.lora_alpha": 8.0,
        "unet.target_modules": sorted(ATTENTION),
        "unet.use_dora": False,
        "unet.use_rslora": False,
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
        "unet.lora_bias": False,
    }
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    assert {f"{block}.to_q.lora_A.weight", f"{block}.to_out.0.lora_B.weight"} <= keys


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    pipeline = trained_pipeline()
    contents = {save_lora(pipeline, tmp_path / str(index)).read_bytes() for index in range(8)}
    assert len(contents) == 1
    assert contents == {save_lora(trained_pipeline(), tmp_path / "again").read_bytes()}


class FullDisk(StableDiffusionPipeline):
    @classmethod
    def save_lora_weights(
        cls, save_directory: Path, weight_name: str, unet_lora_layers: Any, unet_lora_adapter_metadata: Any
    ) -> None:
        (Path(save_directory) / weight_name).write_bytes(b"half")
        raise OSError("No space left on device")


class NoMetadata(StableDiffusionPipeline):
    @classmethod
    def save_lora_weights(cls, save_directory: Path, unet_lora_layers: Any) -> None:
        raise AssertionError("must not be called")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    pipeline = trained_pipeline()
    old = save_lora(pipeline, tmp_path).read_bytes()
    with pytest.raises(OSError, match="No space"):
        save_lora(FullDisk(**pipeline.components, requires_safety_checker=False), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHT_NAME]
    assert (tmp_path / WEIGHT_NAME).read_bytes() == old


def test_a_pipeline_that_would_lose_the_metadata_is_refused(tmp_path: Path) -> None:
    pipeline = NoMetadata(**trained_pipeline().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="NoMetadata cannot save a LoRA of its unet with metadata"):
        save_lora(pipeline, tmp_path)


class NoLoader(StableDiffusionPipeline):
    """As PRX's, whose methods are those of another denoiser."""

    _lora_loadable_modules = ("text_encoder",)  # type: ignore[assignment]

    @classmethod
    def save_lora_weights(cls, **_: Any) -> None:
        raise AssertionError("must not be called")

    load_lora_weights = save_lora_weights


def test_a_denoiser_that_diffusers_does_not_load_is_saved_and_loaded_all_the_same(tmp_path: Path) -> None:
    pipeline = NoLoader(**trained_pipeline().components, requires_safety_checker=False)
    assert not diffusers_loads(pipeline, pipeline.unet)
    assert save_lora(pipeline, tmp_path).read_bytes() == save_lora(trained_pipeline(), tmp_path / "own").read_bytes()
    verify_lora_reloads(pipeline, tmp_path, render)


def test_a_peft_folder_is_detected_as_loading_nothing(tmp_path: Path) -> None:
    pipeline = trained_pipeline()
    unet = tiny_stable_diffusion().unet
    get_peft_model(unet, LoraConfig(target_modules=ATTENTION)).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"loaded nothing.*expected 64 LoRA tensors.*save_lora"):
        verify_lora_reloads(pipeline, tmp_path, render)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], *, keep_metadata: bool = True) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata if keep_metadata else {"format": "pt"})


def test_one_changed_tensor_is_named(tmp_path: Path) -> None:
    pipeline = trained_pipeline()
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_B.weight"
    rewrite(save_lora(pipeline, tmp_path), lambda tensors: tensors[f"unet.{key}"].mul_(1.5))
    with pytest.raises(AdapterMismatchError, match=rf"largest difference is \d.*1 LoRA tensors differ.*{key}"):
        verify_lora_reloads(pipeline, tmp_path, render)


def test_a_machines_own_rounding_is_no_other_adapter(tmp_path: Path) -> None:
    """Equal weights on a machine that never draws an image twice alike, and on one that draws another image."""
    pipeline, errors = trained_pipeline(), iter([0.0, 1e-6, 0.0, 0.02])
    save_lora(pipeline, tmp_path)

    def rounding(pipeline: StableDiffusionPipeline) -> Tensor:
        return render(pipeline) + next(errors)

    assert verify_lora_reloads(pipeline, tmp_path, rounding) == pytest.approx(1e-6, rel=0.2)
    with pytest.raises(
        AdapterMismatchError, match=r"largest difference is 0\.02.*All LoRA tensors and scales are equal"
    ):
        verify_lora_reloads(pipeline, tmp_path, rounding)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    pipeline = trained_pipeline()
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[f"unet.{key}.lora_A.weight"], tensors[f"unet.{key}.lora_B.weight"]

    rewrite(save_lora(pipeline, tmp_path), drop)
    with pytest.raises(AdapterMismatchError, match=rf"got 62; missing \['unet.{key}.lora_A"):
        verify_lora_reloads(pipeline, tmp_path, render)


def test_a_lost_scale_is_told_apart_from_changed_tensors(tmp_path: Path) -> None:
    pipeline = trained_pipeline(lora_alpha=8.0)
    rewrite(save_lora(pipeline, tmp_path), lambda tensors: None, keep_metadata=False)
    with pytest.raises(AdapterMismatchError, match=r"another scale .* in 32 of 32 layers.*expected 2, got 1.*metadata"):
        verify_lora_reloads(pipeline, tmp_path, render)


@pytest.mark.parametrize("init_lora_weights", ["gaussian", "kaiming", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_attaching_leaves_the_output_and_the_global_random_state_alone_and_repeats(
    init_lora_weights: str, use_dora: bool, base_image: Tensor
) -> None:
    values = []
    for global_seed in (1, 2):
        pipeline = tiny_stable_diffusion()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        attach_lora(
            pipeline.unet,
            target_modules=[*ATTENTION, "conv1"],
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
            seed=5,
        )
        assert torch.equal(torch.get_rng_state(), state)
        values.append(lora_parameters(pipeline.unet))
    assert all(torch.equal(values[0][name], value) for name, value in values[1].items())
    torch.testing.assert_close(render(pipeline), base_image, rtol=0, atol=1e-5)
    other = tiny_stable_diffusion().unet
    attach_lora(other, target_modules=[*ATTENTION, "conv1"], init_lora_weights=init_lora_weights, seed=6)
    name = next(name for name in lora_parameters(other) if "lora_A" in name)
    assert not torch.equal(lora_parameters(other)[name], values[0][name])


@pytest.mark.parametrize("quantized", [False, True])
def test_the_size_is_known_before_it_is_attached(quantized: bool) -> None:
    """In 4 bits too, where a weight is one packed column: FLUX.1 in NF4 was refused for want of 160 GiB."""
    unet = tiny_stable_diffusion().unet
    if quantized:
        quantize(unet, {"bnb_4bit_quant_type": "nf4"})
    targets = [*ATTENTION, "conv1"]
    expected = lora_size(unet, targets, 3)
    assert sum(parameter.numel() for parameter in attach_lora(unet, target_modules=targets, rank=3)) == expected


def test_only_the_adapter_is_trainable_and_in_float32() -> None:
    unet = tiny_stable_diffusion(dtype=torch.bfloat16).unet
    base = dict(unet.named_parameters())
    returned = attach_lora(unet, target_modules=ATTENTION, use_dora=True)
    named = lora_parameters(unet)
    assert [id(parameter) for parameter in returned] == [id(parameter) for parameter in named.values()]
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == named.keys()
    assert {parameter.dtype for parameter in returned} == {torch.float32}
    assert len(unet.state_dict()) == len(base) + len(named)


def test_the_disabled_adapter_gives_the_base_model_and_comes_back(base_image: Tensor) -> None:
    pipeline = trained_pipeline(use_dora=True)
    adapted = render(pipeline)
    frozen = next(iter(lora_parameters(pipeline.unet).values()))
    frozen.requires_grad_(False)
    requires_grad = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    with contextlib.suppress(KeyError), adapter_disabled(pipeline.unet):
        assert torch.equal(render(pipeline), base_image)
        with adapter_disabled(pipeline.unet):
            pass
        assert torch.equal(render(pipeline), base_image)  # still off after an inner use
        raise KeyError
    assert torch.equal(render(pipeline), adapted)
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == requires_grad


def test_a_tape_recorded_before_disabling_still_gives_the_adapters_gradients() -> None:
    unet = trained_pipeline().unet
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 8)
    loss = unet(latents, 10, text).sample.square().sum()
    with adapter_disabled(unet):
        loss.backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(unet).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["to_q", "to_x", "q"]},
            r"no layer for 'to_x', 'q'.*UNet2DConditionModel.*conv1,.*to_out\.0",
        ),
        ({"target_modules": []}, "no targets at all"),
        ({"rank": 3, "init_lora_weights": "orthogonal"}, "even for orthogonal"),
    ],
)
def test_wrong_arguments_are_named_before_anything_changes(arguments: dict[str, Any], message: str) -> None:
    unet = tiny_stable_diffusion().unet
    with pytest.raises(ValueError, match=message):
        attach_lora(unet, **{"target_modules": ATTENTION, **arguments})
    assert not lora_parameters(unet)
    assert all(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_second_adapter_is_kept_apart() -> None:
    unet = tiny_stable_diffusion().unet
    attach_lora(unet, target_modules=ATTENTION)
    unet.add_adapter(LoraConfig(target_modules=["to_q"]), "second")
    assert len(lora_parameters(unet, "second")) == 16
    assert len(lora_parameters(unet)) == 64
