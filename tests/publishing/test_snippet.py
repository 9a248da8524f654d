"""The card's snippet runs; where a base comes from, and its licence."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlr_peft.lora import attach_lora, save_lora
from rlr_peft.publishing import License, base_kind, base_license
from rlr_peft.tiny_shapes import pipeline_path
from tests.pipelines import tiny_stable_diffusion
from tests.programs import completed
from tests.publishing.records import FULL, MINIMAL, changed, write


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", License("mit")),
        ("license: other\nlicense_name: sd\nlicense_link: LICENSE.md", License("other", "sd", "LICENSE.md")),
        ("tags: [x]", License()),
        ("license: [", License()),
        (None, License()),
    ],
)
def test_the_licence_is_that_of_the_bases_card(tmp_path: Path, metadata: str | None, expected: License) -> None:
    if metadata is not None:
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nA base.\n")
    assert base_license(str(tmp_path)) == expected


def test_licences_of_bases_whose_card_cannot_be_read() -> None:
    """HF_HUB_OFFLINE is set in tests."""
    assert base_license("tiny-shapes") == License("apache-2.0")
    assert base_license("stabilityai/stable-diffusion-xl-base-1.0") == License("openrail++")
    link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert base_license("black-forest-labs/FLUX.1-dev") == License("other", "flux-1-dev-non-commercial-license", link)
    assert base_license("someone/their-finetune") == License()


def run_snippet(folder: Path) -> None:
    """Run the card's code as a reader would, in the adapter's folder and without a network."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)
    done = completed(["-c", f"import warnings\nwarnings.simplefilter('error', FutureWarning)\n{code}"], cwd=folder)
    assert done.returncode == 0, done.stderr


def save_adapter(pipeline: object, folder: Path) -> None:
    """An adapter that visibly changes the images."""
    parameters = attach_lora(pipeline.unet, target_modules=["to_q", "to_k", "to_v", "to_out.0"], rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_lora(pipeline, folder)


def test_the_snippet_draws_the_image_of_the_adapter_on_a_local_pipeline(tmp_path: Path) -> None:
    base, adapter = tmp_path / 'a "base" folder', tmp_path / "adapter"
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(base)
    prompt, inference = 'say "hi" {{ 7 }} \\ é', {"num_inference_steps": 2, "negative_prompt": 'a "bad" \\ one'}

    def draw() -> Image.Image:
        return pipeline(prompt, **inference, generator=torch.Generator().manual_seed(0)).images[0]

    without_adapter = draw()
    save_adapter(pipeline, adapter)
    shown = {"shown": [prompt, "another"]}
    write(adapter, changed(MINIMAL, base={"model": str(base)}, sampling={"call": inference}, prompts=shown))
    run_snippet(adapter)
    with Image.open(adapter / "image.png") as picture:
        drawn = picture.convert("RGB").tobytes()
    assert drawn == draw().tobytes()
    assert drawn != without_adapter.tobytes()


def test_the_snippet_runs_on_tiny_shapes(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    save_adapter(StableDiffusionPipeline.from_pretrained(pipeline_path()), folder)
    write(folder, FULL)
    run_snippet(folder)
    with Image.open(folder / "image.png") as picture:
        assert picture.size == (64, 64)


def test_a_published_adapter_is_loaded_from_the_hub(folder: Path) -> None:
    text = write(folder, changed(FULL, adapter={"repo_id": "someone/their-adapter"}))
    expected = 'pipe.load_lora_weights("someone/their-adapter", weight_name="pytorch_lora_weights.safetensors")'
    assert expected in text
    assert "In the folder of this file" not in text


def test_the_snippet_names_branches_and_parts_that_are_not_the_bases(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    record = changed(
        MINIMAL,
        adapter={"repo_id": "me/x", "revision": "trial"},
        base={
            "options": {"revision": "fp16", "variant": "fp16"},
            "components": {"vae": str(tmp_path / "vae"), "motion_adapter": "someone/motion"},
        },
        sampling={"fps": 8},
    )
    text = write(folder, record)
    for line in (
        "from diffusers import AnimateDiffPipeline, AutoModel, MotionAdapter",
        f'vae = AutoModel.from_pretrained("{tmp_path / "vae"}", dtype=torch.float32)',
        'motion_adapter = MotionAdapter.from_pretrained("someone/motion", dtype=torch.float32)',
        'pipe = AnimateDiffPipeline.from_pretrained("CompVis/stable-diffusion-v1-4", revision="fp16", variant="fp16", '
        "vae=vae, motion_adapter=motion_adapter, dtype=torch.float32)",
        'pipe.load_lora_weights("me/x", weight_name="pytorch_lora_weights.safetensors", revision="trial")',
    ):
        assert f"\n{line}\n" in text, line
    through_peft = write(folder, changed(record, adapter={"peft_config": {"r": 2}}))
    assert 'hf_hub_download("me/x", "pytorch_lora_weights.safetensors", revision="trial")' in through_peft


def test_a_snippet_with_another_vae_runs(tmp_path: Path) -> None:
    base, adapter, vae = tmp_path / "base", tmp_path / "adapter", tmp_path / "vae"
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(base)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 0.3
    pipeline.vae.save_pretrained(vae)
    save_adapter(pipeline, adapter)
    inference = {"num_inference_steps": 2}
    parts = {"model": str(base), "components": {"vae": str(vae)}}
    write(adapter, changed(MINIMAL, base=parts, sampling={"call": inference}, prompts={"shown": ["a cat"]}))
    run_snippet(adapter)
    drawn = pipeline("a cat", **inference, generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(adapter / "image.png") as picture:
        assert picture.convert("RGB").tobytes() == drawn.tobytes()


def test_where_a_base_comes_from(tmp_path: Path) -> None:
    assert base_kind("tiny-shapes") == "embedded"
    assert base_kind(str(tmp_path)) == "folder"
    assert base_kind("CompVis/stable-diffusion-v1-4") == "hub"
