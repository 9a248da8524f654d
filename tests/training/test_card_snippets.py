"""The card of a real run: its snippet, executed in the folder, draws what the run's numbers were measured with."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from PIL import Image

from rlr_peft.build import Run, build_chain, evaluation_chain, in_eval_mode
from rlr_peft.cli import main
from rlr_peft.config import save_config
from rlr_peft.inference import DiffusiveChainOfThought
from rlr_peft.lora import WEIGHT_NAME, save_lora
from rlr_peft.prompt import Prompt
from rlr_peft.publishing import Images, StoredCard, write_card
from rlr_peft.training import Progress, evaluate_base, finish, resume, run_record, train
from tests.families.image_pipelines import sd3
from tests.pipelines import chain_over, tiny_stable_diffusion
from tests.training.runs import build, config_file


def leading() -> DiffusionPipeline:
    return tiny_stable_diffusion()


def trailing() -> DiffusionPipeline:
    return tiny_stable_diffusion("v_prediction", timestep_spacing="trailing")


def pndm() -> DiffusionPipeline:
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    return pipeline


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "leading base, trailing steps": (  # looked at otherwise than trained
        leading,
        {
            "timestep_spacing": "trailing",
            "resolution": 16,
            "evaluation_steps": 6,
            "evaluation_guidance_scale": 2.0,
            "evaluation_resolution": 32,
        },
        'DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")',
    ),
    "trailing base, leading steps": (
        trailing,
        {"timestep_spacing": "leading", "negative_prompt": "ugly"},
        'DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")',
    ),
    "another solver": (
        pndm,
        {"step_kind": "flow-sde"},
        "DDIMScheduler.from_config(pipe.scheduler.config)",
    ),
    "a scheduler by name": (
        leading,
        {"evaluation_scheduler": "DPMSolverMultistepScheduler"},
        "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)",
    ),
    "flow matching": (sd3, {"height": 16, "width": 16}, "sigmas=[1 - step / 4 for step in range(4)],"),
}


def started_run(workplace: Path, folder: Path, make: Any, **values: Any) -> Run:
    """A run on a base of its own."""
    make().save_pretrained(folder / "base")
    unseen = [{"text": "a cat", "negative": "fur"}, {"text": "a dog", "negative": None}]
    (folder / "unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    config = config_file(
        workplace,
        folder / "out",
        **{
            "pretrained_model_name_or_path": str(folder / "base"),
            "evaluation_prompt_path": str(folder / "unseen.jsonl"),
            "num_evaluation_images": 2,
            "max_train_steps": 1,
            "estimator": "full-bp",
            "learning_rate": 0.1,
            "gradient_accumulation_steps": 1,
            **values,
        },
    )
    return build(config)


def trained_run(workplace: Path, folder: Path, make: Any, **values: Any) -> Run:
    """What the script does, in this process."""
    run = started_run(workplace, folder, make, **values)
    progress = resume(run)
    base = evaluate_base(run)
    finish(run, train(run, progress), base)
    return run


def run_with_card(workplace: Path, folder: Path, make: Any, **values: Any) -> Run:
    """A run that was not trained; its adapter is moved at random and has its card."""
    run = started_run(workplace, folder, make, **values)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.chain.parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    run.output_dir.mkdir()
    save_lora(run.pipeline, run.output_dir)
    write_card(run.output_dir, StoredCard(run_record(run, Progress(), {}, Images())))
    return run


def snippet_of(folder: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


def latents_of(snippet: str) -> torch.Tensor:
    """What the snippet draws, before decoding."""
    as_latents = snippet.replace("    generator=", '    output_type="latent",\n    generator=')
    scope: dict[str, Any] = {}
    exec(as_latents.replace('image.save("image.png")', ""), scope)
    latents: torch.Tensor = scope["image"]
    return latents


def measured_latents(run: Run, prompt: str, noises: torch.Tensor | None = None) -> torch.Tensor:
    """What the run's evaluation draws of this prompt with the snippet's seed."""
    chain = evaluation_chain(run.config, build_chain(run.config, run.pipeline))
    with in_eval_mode(chain), torch.no_grad():
        latents = chain.draw([prompt], [0]) if noises is None else chain.sample([prompt], [0], noises).latents
        return latents[0][0]


@pytest.mark.parametrize("name", CASES)
def test_the_snippet_draws_what_was_measured(
    name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, values, line = CASES[name]
    is_trained = name == "leading base, trailing steps"
    run = (trained_run if is_trained else run_with_card)(workplace, tmp_path, make, **values)
    text = (run.output_dir / "README.md").read_text()
    assert line in text
    assert "draws without noise" not in text and "other noise" not in text
    if is_trained:
        words = (
            "6 DDIM steps (DDIMScheduler, timestep_spacing trailing), eta 0 and guidance scale 2, at 32 x 32 pixels."
        )
        assert words in text
        assert "over a chain of 4 steps without noise and guidance scale 3, at 16 x 16 pixels." in text
        images = Image.open(run.output_dir / "before_after.png")
        assert all(side > 0 for side in images.size)
    snippet = snippet_of(run.output_dir)
    prompt = re.findall(r'pipe\(\n    prompt="(.*)",', snippet)[0]
    monkeypatch.chdir(run.output_dir)
    expected = measured_latents(run, prompt)
    torch.testing.assert_close(latents_of(snippet), expected, rtol=1e-4, atol=1e-4)
    if "timestep_spacing" in values:
        without = re.sub(r"pipe\.scheduler = .*\n", "", snippet)
        assert (latents_of(without) - expected).norm() > 0.05 * expected.norm()
    exec(snippet, {})
    with torch.no_grad():
        image = run.chain.decode(expected[None], [prompt])[0]
    saved = numpy.asarray(Image.open(run.output_dir / "image.png"), dtype=float)
    assert abs(saved - image.permute(1, 2, 0).numpy() * 255).max() <= 1
    if is_trained:
        check_space(run.output_dir, tmp_path, prompt, saved, monkeypatch)


def check_space(
    folder: Path, tmp_path: Path, prompt: str, expected: numpy.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's code draws the card's image with the adapter, and without it the base's."""
    checkpoint = folder / "checkpoint-9"  # has no records, but its run's config beside it
    shutil.copytree(folder, checkpoint, ignore=shutil.ignore_patterns("checkpoint-*", "run_record.json", "config.yaml"))
    for name, adapter in {"whole": folder, "bare": checkpoint}.items():
        assert main(["space", str(adapter), f"--output={tmp_path / name}"]) == 0
        compile((tmp_path / name / "app.py").read_text(), "app.py", "exec")
        lines = (tmp_path / name / "requirements.txt").read_text().splitlines()
        assert lines[0].startswith("gradio==") and "torch" in lines
        monkeypatch.chdir(tmp_path)
        scope = runpy.run_path(str(tmp_path / name / "drawing.py"))
        base, adapted = (numpy.asarray(image, dtype=float) for image in scope["draw"](prompt, 0))
        scope["pipe"].unload_lora_weights()
        assert (numpy.asarray(scope["draw"](prompt, 0)[0]) == base).all() and (base != adapted).any()
        assert name == "bare" or abs(adapted - expected).max() <= 1
    shutil.copy(folder / WEIGHT_NAME, tmp_path)
    words = {str(folder): "whole", str(tmp_path / WEIGHT_NAME): "none"}  # a folder that is not empty; no base
    for adapter, output in words.items():
        with pytest.raises(SystemExit):
            main(["space", adapter, f"--output={tmp_path / output}"])
    assert not (tmp_path / "none").exists()


def test_noise_that_diffusers_knows_is_drawn_from_the_same_chain(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eta the snippet draws its noises in another order: given them in that order, the chain draws the same."""
    values = {"timestep_spacing": "trailing", "evaluation_eta": 0.6, "negative_prompt_column": "negative"}
    run = run_with_card(workplace, tmp_path, leading, **values, prompt_path=str(tmp_path / "unseen.jsonl"))
    text, snippet = (run.output_dir / "README.md").read_text(), snippet_of(run.output_dir)
    assert '    prompt="a cat",\n' in snippet and '    negative_prompt="fur",\n' in snippet
    assert "    eta=0.6,\n" in snippet and "draws their noise in another order" in text
    chain = evaluation_chain(run.config, build_chain(run.config, run.pipeline))
    words = "4 ancestral steps (DDIMScheduler, timestep_spacing trailing), eta 0.6 and guidance scale 3"
    assert chain.sampling_in_words() == words
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(5)]
    noises = torch.stack([*reversed(drawn[1:]), drawn[0]])
    monkeypatch.chdir(run.output_dir)
    expected = measured_latents(run, Prompt("a cat", "fur"), noises)
    torch.testing.assert_close(latents_of(snippet), expected, rtol=1e-4, atol=1e-4)


def test_noise_that_diffusers_does_not_know_is_said() -> None:
    chain = chain_over(leading(), num_inference_steps=3, step_kind="flow-sde", eta=0.7)
    scheduler = chain.inference_scheduler()
    assert scheduler.call_options() == {}
    assert "No scheduler of diffusers takes the flow-sde steps with eta 0.7" in (scheduler.difference or "")
    assert chain.sampling_in_words().startswith(
        "3 flow-sde steps (DDIMScheduler, timestep_spacing leading), eta 0.7 and"
    )


def test_stage_prompts_and_a_merged_pipeline_draw_so_too(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with_card(workplace, tmp_path, leading, timestep_spacing="trailing", dcot_rules=True)
    text = (run.output_dir / "README.md").read_text()
    assert "measured with a prompt for every stage" in text
    told = re.findall(r"`rlr_peft.inference.(DiffusiveChainOfThought.from_config\(.*\))`", text)[0]
    assert told == 'DiffusiveChainOfThought.from_config(pipe, "config.yaml", eta=0.0)'
    monkeypatch.chdir(run.output_dir)
    save_config(run.config, Path("config.yaml"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
    draw = eval(told, {"DiffusiveChainOfThought": DiffusiveChainOfThought, "pipe": pipe})
    prompt = run.evaluation_prompts[0]  # type: ignore[index]
    images = draw(prompt, seeds=[0], output_type="pt").images
    expected = measured_latents(run, prompt)
    with torch.no_grad():
        torch.testing.assert_close(images, run.chain.decode(expected[None], [prompt]), rtol=0, atol=1e-5)

    words = {"base": tmp_path / "base", "adapter": run.output_dir, "output": tmp_path / "merged"}
    assert main(["merge", *(f"--{flag}={place}" for flag, place in words.items())]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "the DDIMScheduler that the adapter's numbers were measured with (timestep_spacing trailing)." in card
    monkeypatch.chdir(tmp_path / "merged")
    scope: dict[str, Any] = {}
    exec(snippet_of(tmp_path / "merged").replace("generator=", 'output_type="latent", generator='), scope)
    assert scope["pipe"].scheduler.config.timestep_spacing == "trailing"
    plain = chain_over(run.pipeline, num_inference_steps=4, eta=0.0, timestep_spacing="trailing", guidance_scale=3.0)
    with in_eval_mode(plain), torch.no_grad():
        expected = plain.sample([str(run.prompts[0])], [0]).latents[0]
    torch.testing.assert_close(scope["result"].images, expected, rtol=1e-3, atol=1e-3)
