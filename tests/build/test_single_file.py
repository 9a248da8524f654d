"""A base in one file under the original keys: the same pipeline as its folder, in training, plan and card."""

from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from rlr_peft.build import load_pipeline
from rlr_peft.chain import BaseModelError
from rlr_peft.config import ConfigError, ModelArguments, load_config
from rlr_peft.plan import plan_run, weight_bytes
from rlr_peft.training import finish
from tests.build.single_files import save_as_flux_file, save_as_sdxl_file, save_as_single_file
from tests.families.image_pipelines import flux, sdxl
from tests.pipelines import tiny_stable_diffusion
from tests.training.runs import config_file, train_here

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The single file, and a folder of its family with other weights."""
    folder = tmp_path_factory.mktemp("single")
    tiny_stable_diffusion(seed=1).save_pretrained(folder / "family")
    save_as_single_file(tiny_stable_diffusion(), folder / "model.safetensors")
    return str(folder / "model.safetensors"), str(folder / "family")


def assert_same_weights(pipeline: Any, loaded: Any, *names: str) -> None:
    for name in names:
        expected, found = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


def test_all_weights_are_those_of_the_pipeline(places: tuple[str, str]) -> None:
    file, family = places
    loaded = load_pipeline(ModelArguments(file, single_file_config=family), CPU)
    assert_same_weights(tiny_stable_diffusion(), loaded, "unet", "vae", "text_encoder")
    assert loaded.safety_checker is None


def sdxl_of_two_widths() -> Any:
    """diffusers tells the text encoders of a file apart by their widths, which SDXL's are 768 and 1280 of."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        pipeline = sdxl()
        first, second = pipeline.text_encoder, pipeline.text_encoder_2
        wide = second.config.to_dict() | {"hidden_size": 24}
        pipeline.text_encoder = type(first)(type(first.config)(**(first.config.to_dict() | {"hidden_size": 8})))
        pipeline.text_encoder_2 = type(second)(type(second.config)(**wide))
    return pipeline


def test_all_weights_of_sdxl_are_those_of_the_pipeline(tmp_path: Path) -> None:
    pipeline = sdxl_of_two_widths()
    save_as_sdxl_file(pipeline, tmp_path / "model.safetensors")
    pipeline.save_pretrained(tmp_path / "family")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        next((tmp_path / "family" / part).glob("*.safetensors")).unlink()  # all weights come from the file
    loaded = load_pipeline(
        ModelArguments(str(tmp_path / "model.safetensors"), single_file_config=str(tmp_path / "family")), CPU
    )
    assert_same_weights(pipeline, loaded, "unet", "vae", "text_encoder", "text_encoder_2")


def test_all_weights_of_flux_are_those_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer and VAE come from the file, text encoders from the folder. The width of FLUX.1 is a number inside
    diffusers' converter, which is the small pipeline's here."""
    pipeline = flux()
    settings = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = settings["checkpoint_mapping_fn"]
    constants = [pipeline.transformer.inner_dim if value == 3072 else value for value in convert.__code__.co_consts]
    assert constants != list(convert.__code__.co_consts)
    narrow = FunctionType(convert.__code__.replace(co_consts=tuple(constants)), convert.__globals__)
    monkeypatch.setitem(settings, "checkpoint_mapping_fn", narrow)
    save_as_flux_file(pipeline, tmp_path / "model.safetensors")
    pipeline.save_pretrained(tmp_path / "family")
    for part in ("transformer", "vae"):
        next((tmp_path / "family" / part).glob("*.safetensors")).unlink()
    loaded = load_pipeline(
        ModelArguments(str(tmp_path / "model.safetensors"), single_file_config=str(tmp_path / "family")), CPU
    )
    assert_same_weights(pipeline, loaded, "transformer", "vae", "text_encoder", "text_encoder_2")


def test_it_trains_and_the_cards_snippet_draws(
    places: tuple[str, str], workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, family = places
    base = {"pretrained_model_name_or_path": file, "single_file_config": family}
    run, progress = train_here(config_file(workplace, tmp_path / "out", max_train_steps=1, **base))
    finish(run, progress, before=None)
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    assert f'StableDiffusionPipeline.from_single_file("{file}", config="{family}"' in snippet
    monkeypatch.chdir(tmp_path / "out")
    exec(snippet, {})
    assert (tmp_path / "out" / "image.png").is_file()


def test_it_is_planned_as_its_family(places: tuple[str, str], workplace: Path) -> None:
    file, family = places
    base = ["--pretrained_model_name_or_path", file, "--single_file_config", family]
    plan = plan_run(
        load_config([*base, "--prompt_path", str(workplace / "prompts.txt"), "--reward_fn", "jpeg-compressibility"])
    )
    models = {name: getattr(tiny_stable_diffusion(), name) for name in ("unet", "vae", "text_encoder")}
    assert plan.facts.weights == {name: weight_bytes(model) for name, model in models.items()}


def test_refusals(places: tuple[str, str], tmp_path: Path) -> None:
    file, family = places
    required = ["--prompt_path", "tiny-shapes/train", "--reward_fn", "tiny-shapes", "--pretrained_model_name_or_path"]
    with pytest.raises(ConfigError, match=r"single_file_config: expected a .safetensors file as pretrained_model_name"):
        load_config([*required, family, "--single_file_config", family])
    with pytest.raises(
        ConfigError, match="variant: expected a folder or Hub id of a diffusers pipeline with it, got the"
    ):
        load_config([*required, file, "--variant", "fp16"])
    with pytest.raises(BaseModelError, match=r"needs the configs of its family: .* Give --single_file_config a folder"):
        load_pipeline(ModelArguments(file, single_file_config=str(tmp_path)), CPU)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(BaseModelError, match=r"broken.safetensors cannot be loaded"):
        load_pipeline(ModelArguments(str(tmp_path / "broken.safetensors"), single_file_config=family), CPU)
