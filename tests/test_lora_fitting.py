"""An adapter arrives whole or not at all, and leaves without a trace; what diffusers passes over is an error."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlr_peft.lora import (
    WEIGHT_NAME,
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    adapted_parts,
    adapter_loaded,
    attach_lora,
    find_adapter,
    load_fitting_lora,
    lora_parameters,
    save_lora,
    unload_lora,
)
from tests.compare.adapter_hub import adapter_hub
from tests.families.image_pipelines import pixart_sigma, sd3, sdxl
from tests.families.video_pipelines import text_to_video_sd
from tests.pipelines import tiny_stable_diffusion

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def render(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    output = pipeline(["a ball"], num_inference_steps=1, guidance_scale=3.0, generator=generator, output_type="np")
    return torch.from_numpy(output.images)


def stir(denoiser: nn.Module) -> None:
    """Stands for training: lora_B moves away from zero."""
    generator = torch.Generator().manual_seed(7)
    for parameter in lora_parameters(denoiser).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def adapter_of(pipeline: Any, folder: Path, **options: Any) -> Path:
    """The folder of a trained adapter of this pipeline."""
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    attach_lora(denoiser, **{"target_modules": ATTENTION, **options})
    stir(denoiser)
    save_lora(pipeline, folder)
    return folder


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def base_image(base: StableDiffusionPipeline) -> Tensor:
    return render(base)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(tiny_stable_diffusion(), tmp_path_factory.mktemp("adapter"))


def kohya(folder: Path, target: Path) -> Path:
    """The same adapter as kohya's programs and ComfyUI store it."""
    tensors = convert_state_dict_to_kohya(load_file(folder / WEIGHT_NAME))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target)
    return target


def with_text_encoder(folder: Path) -> Path:
    """An adapter of the UNet and of the text encoder."""
    pipeline = tiny_stable_diffusion()
    attach_lora(pipeline.unet, target_modules=ATTENTION)
    attach_lora(pipeline.text_encoder, target_modules=["q_proj", "v_proj"])
    for model in (pipeline.unet, pipeline.text_encoder):
        stir(model)
    pipeline.save_lora_weights(
        folder, get_peft_model_state_dict(pipeline.unet), get_peft_model_state_dict(pipeline.text_encoder)
    )
    return folder


def test_an_adapter_arrives_and_leaves_without_a_trace(
    base: StableDiffusionPipeline, base_image: Tensor, adapter: Path, tmp_path: Path
) -> None:
    files = find_adapter(str(adapter))
    with adapter_loaded(base, files):
        image = render(base)
        assert adapted_parts(base) == ["unet"]
        with pytest.raises(ValueError, match="a pipeline without adapters"), adapter_loaded(base, files):
            pass
    assert (image - base_image).abs().max() > 1e-3
    assert torch.equal(render(base), base_image) and adapted_parts(base) == []
    assert not any("lora" in name for name in base.unet.state_dict())
    other = find_adapter(str(adapter_of(tiny_stable_diffusion(), tmp_path, use_dora=True, rank=2)))
    with adapter_loaded(base, other):
        assert not torch.equal(render(base), image)
    with adapter_loaded(base, files):
        assert torch.equal(render(base), image)


def test_kohyas_format_arrives_whole(base: StableDiffusionPipeline, adapter: Path, tmp_path: Path) -> None:
    path = kohya(adapter, tmp_path / "mine.safetensors")
    ours, theirs = find_adapter(str(adapter)), find_adapter(str(path))
    assert find_adapter(str(tmp_path)).weight_name == "mine.safetensors"
    images = []
    for files in (ours, theirs):
        count = load_fitting_lora(base, files)
        assert count == len(load_file(adapter / WEIGHT_NAME)) // 2
        images.append(render(base))
        unload_lora(base)
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)
    assert ours.fingerprint() != theirs.fingerprint() == find_adapter(str(tmp_path)).fingerprint()


def test_an_adapter_of_the_text_encoder_too(base: StableDiffusionPipeline, base_image: Tensor, tmp_path: Path) -> None:
    with adapter_loaded(base, find_adapter(str(with_text_encoder(tmp_path)))):
        assert adapted_parts(base) == ["text_encoder", "unet"]
    assert torch.equal(render(base), base_image)


@pytest.mark.parametrize(("build", "part"), [(pixart_sigma, "transformer"), (text_to_video_sd, "unet")])
def test_where_diffusers_has_no_loader(build: Callable[[], Any], part: str, tmp_path: Path) -> None:
    files = find_adapter(str(adapter_of(build(), tmp_path)))
    fresh = build()
    weights = {name: value.clone() for name, value in getattr(fresh, part).state_dict().items()}
    for _ in range(2):
        with adapter_loaded(fresh, files):
            assert adapted_parts(fresh) == [part]
        found = getattr(fresh, part).state_dict()
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def narrower() -> StableDiffusionPipeline:
    """The same names of layers, other sizes."""
    pipeline = tiny_stable_diffusion()
    config = {**pipeline.unet.config, "block_out_channels": (4, 8)}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    return pipeline


@pytest.mark.parametrize(
    ("owner", "base_of_another_kind"),
    [(tiny_stable_diffusion, sd3), (sd3, tiny_stable_diffusion), (tiny_stable_diffusion, sdxl), (narrower, None)],
    ids=["SD in SD3", "SD3 in SD", "SD in SDXL", "other sizes"],
)
def test_an_adapter_of_another_base_is_refused(
    owner: Callable[[], Any], base_of_another_kind: Callable[[], Any] | None, tmp_path: Path
) -> None:
    files = find_adapter(str(adapter_of(owner(), tmp_path / "adapter")))
    pipeline = tiny_stable_diffusion() if base_of_another_kind is None else base_of_another_kind()
    with pytest.raises(AdapterMismatchError) as caught, adapter_loaded(pipeline, files):
        pytest.fail("nothing may be drawn with it")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"The adapter {files.place} does not fit the base, a {type(pipeline).__name__}: ")
    assert adapted_parts(pipeline) == [], "what had been loaded is out again"


def test_layers_that_diffusers_passes_over_are_an_error(
    base: StableDiffusionPipeline, adapter: Path, tmp_path: Path
) -> None:
    tensors = load_file(adapter / WEIGHT_NAME)
    renamed = {
        key.replace("mid_block", "middle_block") if "mid_block" in key else key: value for key, value in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHT_NAME)
    with pytest.raises(AdapterMismatchError, match="does not fit the base, a StableDiffusionPipeline"):
        load_fitting_lora(base, find_adapter(str(tmp_path)))
    unload_lora(base)


def test_weights_that_are_no_adapter_are_an_error(base: StableDiffusionPipeline, tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(3)}, tmp_path / "mine.safetensors")
    with pytest.raises(AdapterFormatError, match="expected LoRA weights, got the weights of a whole denoiser"):
        load_fitting_lora(base, find_adapter(str(tmp_path)))
    unload_lora(base)


def test_metadata_that_name_a_module_import_none(
    base: StableDiffusionPipeline, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with safe_open(adapter / WEIGHT_NAME, "pt") as header:
        metadata = json.loads(header.metadata()["lora_adapter_metadata"])
    metadata |= {"unet.megatron_config": {"a": 1}, "unet.megatron_core": "evil_module"}
    save_file(load_file(adapter / WEIGHT_NAME), tmp_path / WEIGHT_NAME, {"lora_adapter_metadata": json.dumps(metadata)})
    assert load_fitting_lora(base, find_adapter(str(tmp_path))) > 0
    assert "evil_module" not in sys.modules
    unload_lora(base)


def test_a_damaged_file_is_an_error(base: StableDiffusionPipeline, adapter: Path, tmp_path: Path) -> None:
    content = (adapter / WEIGHT_NAME).read_bytes()
    (tmp_path / WEIGHT_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterFormatError, match="it is damaged or not whole; get it again"):
        load_fitting_lora(base, find_adapter(str(tmp_path)))


@contextmanager
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client talks to a Hub on the loopback; both settings are read from the environment at import only."""
    with adapter_hub("someone/adapter", folder, "hf_secret") as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture
def hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with hub_of(adapter, monkeypatch):
        yield


def test_a_repository_of_pefts_comes_with_its_settings(
    base: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(tiny_stable_diffusion().unet, LoraConfig(r=2, lora_alpha=6, target_modules=["attn1.to_q"]))
    model.save_pretrained(tmp_path / "repo")
    with hub_of(tmp_path / "repo", monkeypatch):
        files = find_adapter("someone/adapter", token="hf_secret", cache_dir=str(tmp_path / "cache"))
    with adapter_loaded(base, files):
        layer = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        assert layer.scaling == {"default_0": 3.0}


def test_a_private_repository_needs_its_token(hub: None, adapter: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    for token in (None, "hf_wrong"):
        with pytest.raises(AdapterNotFoundError, match="was not found, or is private: check the name, and log in with"):
            find_adapter("someone/adapter", token=token, cache_dir=cache)
    found = find_adapter("someone/adapter@main", token="hf_secret", cache_dir=cache)
    assert found.fingerprint() == find_adapter(str(adapter)).fingerprint()
    assert found.paths[0].is_relative_to(cache)
    of_pull_request = find_adapter("someone/adapter@refs/pr/1", token="hf_secret", cache_dir=cache)
    assert of_pull_request.fingerprint() == found.fingerprint()


def test_places_without_an_adapter_are_explained(tmp_path: Path) -> None:
    def refused(place: Path | str) -> str:
        with pytest.raises(AdapterNotFoundError) as caught:
            find_adapter(str(place))
        return str(caught.value)

    assert "expected pytorch_lora_weights.safetensors or one .safetensors file, got none" in refused(tmp_path)
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert "got 2 of them (one.safetensors, two.safetensors): name the file" in refused(tmp_path)
    assert "a path that does not exist" in refused(tmp_path / "nowhere")
    assert "expected user/name@REVISION, got '../../x'; correct it." in refused("some/repo@../../x")
    assert "a path that does not exist" in refused("outputs/deep/inside")
    assert refused("some/repo").startswith("adapter some/repo: there is no such folder or file here, and the Hub")
    assert "is not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set" in refused("some/repo")
    assert find_adapter(str(tmp_path / "one.safetensors")).weight_name == "one.safetensors"
