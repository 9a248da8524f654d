"""A base in one file under the original keys: the same pipeline as its folder, in training, plan and card."""

from pathlib import Path

import pytest
import torch

from rlr_peft.build import load_pipeline
from rlr_peft.chain import BaseModelError
from rlr_peft.config import ConfigError, ModelArguments, load_config
from rlr_peft.plan import plan_run
from rlr_peft.training import finish
from tests.build.single_files import save_as_single_file
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


def test_all_weights_are_those_of_the_pipeline(places: tuple[str, str]) -> None:
    file, family = places
    loaded = load_pipeline(ModelArguments(file, single_file_config=family), CPU)
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(tiny_stable_diffusion(), name).state_dict()
        found = getattr(loaded, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    assert loaded.safety_checker is None


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
    plans = [
        plan_run(
            load_config([*base, "--prompt_path", str(workplace / "prompts.txt"), "--reward_fn", "jpeg-compressibility"])
        )
        for base in (
            ["--pretrained_model_name_or_path", file, "--single_file_config", family],
            ["--pretrained_model_name_or_path", family],
        )
    ]
    assert plans[0].facts.weights == plans[1].facts.weights


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
