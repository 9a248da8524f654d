"""Pictures that samples are drawn from: from the data through chain, reward and comparison to the card."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from rlr_peft.chain import batches_of_one_call, family_of
from rlr_peft.prompt import ConditionImage, Prompt, PromptError
from rlr_peft.prompts import Columns, load_prompts
from rlr_peft.rewards import CallableReward, score_images
from tests.families.image_pipelines import flux_kontext, qwen_image_edit, qwen_image_edit_plus
from tests.families.table import CASES, COLOURS, SMALL, drawn_alone, load, picture, prompts_of
from tests.families.video_pipelines import wan_first_frame
from tests.pipelines import chain_over
from tests.training.runs import run_script

COLUMNS = Columns(image="from")
REWARD = """
def likeness(images, prompts, metadata):
    import torch
    given = torch.stack([entry["condition_image"] for entry in metadata])
    assert given.shape == images.shape
    return -(images - given).abs().mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX Kontext, and a table of prompts with pictures."""
    folder = tmp_path_factory.mktemp("kontext")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        flux_kontext().save_pretrained(folder / "base")
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 24), colour).save(folder / f"{name}.png")
        rows.append({"text": f"make it {name}", "from": f"{name}.png"})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def test_pictures_come_by_path_and_inside_the_data(place: Path) -> None:
    by_path = load_prompts(str(place / "edits.jsonl"), columns=COLUMNS)
    files = [{"bytes": (place / f"{name}.png").read_bytes(), "path": None} for name in COLOURS]
    table = pyarrow.table({"text": [prompt.text for prompt in by_path], "from": files})
    pyarrow.parquet.write_table(table, place / "edits.parquet")
    inside = load_prompts(str(place / "edits.parquet"), columns=COLUMNS)
    for prompts in (by_path, inside):
        for prompt, colour in zip(prompts, COLOURS.values(), strict=True):
            assert prompt.image is not None
            picture = prompt.image.fitted(8, 16)
            assert picture.size == (8, 16) and picture.getpixel((4, 8)) == colour


def test_a_missing_picture_is_named(place: Path) -> None:
    table = place / "missing.jsonl"
    for value, got in (
        ("none.png", "none.png, where there is no file"),
        ("../red.png", r"\.\./red.png, which leaves that folder"),
        (None, "none"),
        (3, "3"),
    ):
        table.write_text(json.dumps({"text": "a", "from": value}))
        with pytest.raises(PromptError, match=f"line 1: expected a picture in column from, got {got}; write paths"):
            load_prompts(str(table), columns=COLUMNS)
    with pytest.raises(PromptError, match="condition image of the data: cannot be read"):
        ConditionImage(data=b"no picture").fitted(4, 4)


def test_the_chain_draws_what_the_pipeline_draws_and_replays_it(place: Path) -> None:
    pipeline = load(str(place / "base"))
    assert family_of(pipeline).pipeline_tag == "image-to-image"
    prompts = load_prompts(str(place / "edits.jsonl"), columns=COLUMNS)
    chain = chain_over(pipeline, num_inference_steps=2, eta=0.0, **SMALL)
    trajectory = chain.sample(prompts, [3, 4])
    with torch.no_grad():
        images = chain.decode(trajectory.latents[0], prompts)
    expected = drawn_alone(pipeline, chain, prompts, [3, 4])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    swapped = [Prompt(prompt.text, image=other.image) for prompt, other in zip(prompts, prompts[::-1], strict=True)]
    assert not torch.allclose(chain.sample(swapped, [3, 4]).latents[0], trajectory.latents[0], atol=1e-3)
    noisy = chain_over(pipeline, num_inference_steps=2, **SMALL)
    drawn = noisy.sample(prompts, [3, 4])
    for t in (1, 2):
        assert torch.equal(noisy.replay(drawn, t).next_latents(drawn.noise(t)), drawn.latents[t - 1])


@pytest.mark.parametrize("build", [qwen_image_edit_plus, wan_first_frame])
def test_classes_that_draw_one_picture_at_once(build: Callable[[], DiffusionPipeline]) -> None:
    """A batch is drawn in several calls: replayed bit for bit, and as each sample alone."""
    if build is wan_first_frame:
        pytest.importorskip("ftfy", reason="diffusers' pipeline of Wan from pictures needs ftfy")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipeline, prompts = build(), prompts_of("wan-i2v")
    size = SMALL | ({"num_frames": 5} if build is wan_first_frame else {})
    chain = chain_over(pipeline, num_inference_steps=2, **size)
    whole = chain.sample(prompts, [3, 4])
    for t in (1, 2):
        assert torch.equal(chain.replay(whole, t).next_latents(whole.noise(t)), whole.latents[t - 1])
    for i in range(2):
        alone = chain.sample(prompts[i : i + 1], [3 + i])
        torch.testing.assert_close(whole.latents[:, i : i + 1], alone.latents, rtol=0, atol=1e-5)
    still = chain.at(eta=0.0)
    with torch.no_grad():
        images = still.decode(still.draw(prompts, [3, 4])[0], prompts)
    # Wan's own call differs from itself by 4e-4 with these weights, which blow up rounding.
    torch.testing.assert_close(images, drawn_alone(pipeline, still, prompts, [3, 4]), rtol=0, atol=2e-3)
    assert chain.separate_samples(2) is None


def test_samples_of_one_picture_are_drawn_in_one_call() -> None:
    red, blue = map(picture, COLOURS.values())
    prompts = [Prompt("a", image=red), Prompt("b", image=red), Prompt("a", image=blue), Prompt("a", image=red)]
    assert batches_of_one_call("any", prompts) == [slice(0, 4)]
    assert batches_of_one_call("same image", prompts) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert batches_of_one_call("one sample", prompts) == [slice(i, i + 1) for i in range(4)]


@pytest.mark.parametrize("name", ["kontext", *(name for name, case in CASES.items() if case.needs_image)])
def test_a_picture_is_encoded_once(
    name: str, place: Path, folder_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn, replayed or decoded, and wherever in a batch it lies."""
    pipeline = load(str(place / "base") if name == "kontext" else folder_of(name))
    encoded = []
    own = type(pipeline.vae).encode
    monkeypatch.setattr(type(pipeline.vae), "encode", lambda *args, **given: encoded.append(0) or own(*args, **given))
    prompts = prompts_of("ltx-i2v" if name == "kontext" else name)
    chain = chain_over(pipeline, num_inference_steps=2, **(SMALL if name == "kontext" else CASES[name].options))
    blank = len(encoded)  # of the empty prompt
    assert blank == (0 if name == "kontext" else 1)
    trajectory = chain.sample(prompts, [3, 4])
    assert len(encoded) == blank + 2
    chain.replay(trajectory, 1)
    chain.decode(trajectory.latents[0], prompts)
    again = chain.at(eta=0.0).sample(prompts[::-1], [5, 6])
    assert len(encoded) == blank + 2 and "encode" not in pipeline.vae.__dict__
    other = Prompt(prompts[0].text, image=picture((0, 255, 0)))
    assert not torch.allclose(chain.at(eta=0.0).sample([other], [6]).latents[0], again.latents[0, 1:], atol=1e-4)
    assert len(encoded) == blank + 3


@pytest.mark.parametrize("build", [qwen_image_edit, qwen_image_edit_plus])
def test_qwen_sees_a_picture_as_sharp_as_in_inference(
    build: Callable[[], DiffusionPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call scales pictures to a million pixels, whatever it draws: they are not made small for that before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipeline = build()
    stripes = numpy.zeros((1024, 2048, 3), numpy.uint8)
    stripes[:, numpy.arange(2048) % 64 < 32] = 255  # a pixel of the 32 that conftest.py has in place of 1024
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    encoded = []

    def encode(vae: object, pixels: torch.Tensor, **_: object) -> None:
        encoded.append(pixels)
        raise InterruptedError

    chain = chain_over(pipeline, num_inference_steps=1, eta=0.0, **SMALL)
    monkeypatch.setattr(type(pipeline.vae), "encode", encode)
    with pytest.raises(InterruptedError):
        chain.sample([Prompt("a", image=ConditionImage(str(tmp_path / "stripes.png")))], [1])
    (pixels,) = encoded
    middle = (512, 0, 1536, 1024)
    shown = Image.fromarray(stripes).resize((32, 32), Image.Resampling.LANCZOS, box=middle)
    expected = torch.from_numpy(numpy.array(shown)).movedim(-1, 0) / 127.5 - 1
    assert expected.std() > 0.5, "of 16 pixels, as many as are drawn, nothing would be left"
    torch.testing.assert_close(pixels[0, :, 0], expected, rtol=0, atol=1e-5)


def test_a_posterior_is_replaced_by_its_mean(folder_of: Callable[[str], str]) -> None:
    """LTX would draw from it, another picture at every call."""
    pipeline = load(folder_of("ltx-i2v"))
    pipeline.vae.encoder.conv_out.conv.bias.data[-1] = 0.0
    chain, prompts = chain_over(pipeline, num_inference_steps=2, **CASES["ltx-i2v"].options), prompts_of("ltx-i2v")
    trajectory = chain.sample(prompts, [3, 4])
    assert torch.equal(chain.replay(trajectory, 2).next_latents(trajectory.noise(2)), trajectory.latents[1])
    image = pipeline.video_processor.preprocess([prompts[0].image.fitted(32, 32)], height=32, width=32)  # type: ignore[union-attr]
    with chain._driver._encoded_images.of([(prompts[0].image, (32, 32))]):
        seen = pipeline.vae.encode(image[:, :, None]).latent_dist
        assert torch.equal(seen.sample(), seen.mean)
    expected = pipeline.vae.encode(image[:, :, None]).latent_dist
    torch.testing.assert_close(seen.mean, expected.mean)
    assert expected.std.min() > 0.5, "there must be something to draw"


def test_what_does_not_fit_is_refused(place: Path) -> None:
    chain = chain_over(load(str(place / "base")), num_inference_steps=2, **SMALL)
    picture = ConditionImage(str(place / "red.png"))
    with pytest.raises(ValueError, match="draws from images, and the prompt 'sky' has none: --image_column"):
        chain.sample([Prompt("a", image=picture), Prompt("sky")], [1, 2])
    with pytest.raises(ValueError, match="and --validation_prompt has none, so leave it out"):
        chain.check_images([Prompt("a", image=picture), Prompt("sky")])
    chain.check_images(["sky"])  # Kontext alone draws from texts too


def test_a_reward_sees_the_picture_at_the_images_size(place: Path) -> None:
    images = torch.full((1, 3, 8, 12), 0.5)
    prompt = Prompt("a", metadata={"own": 1}, image=ConditionImage(str(place / "red.png")))
    seen = []

    def reward(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
        seen.extend(metadata)
        return images.mean((1, 2, 3))

    score_images(CallableReward("seen", reward), images, [prompt])
    (told,) = seen
    assert told["own"] == 1
    expected = torch.tensor(COLOURS["red"])[:, None, None].expand(3, 8, 12) / 255
    assert torch.equal(told["condition_image"], expected)


def trained(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, **sizes: int) -> Path:
    """The folder of a run that draws from the pictures of the edits."""
    values = {
        "pretrained_model_name_or_path": base,
        "prompt_path": str(place / "edits.jsonl"),
        "evaluation_prompt_path": str(place / "edits.jsonl"),
        "image_column": "from",
        "reward_fn": f"{place / 'rewards.py'}:likeness",
        "num_inference_steps": 2,
        "estimator": "refl",
        "learning_rate": 0.01,
        "train_batch_size": 2,
        "num_images_per_prompt": 2,
        "max_train_steps": 1,
        "num_evaluation_images": 2,
        "output_dir": str(tmp_path / "out"),
        **sizes,
    }
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    run_script(monkeypatch, config)
    return tmp_path / "out"


def test_from_data_to_card(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = trained(place, tmp_path, monkeypatch, str(place / "base"), resolution=16)
    for number in range(2):
        picture = numpy.asarray(Image.open(out / "images" / f"condition_{number}.png"))
        assert tuple(picture[8, 8]) in COLOURS.values()
    card = (out / "README.md").read_text()
    assert "![drawn from](images/condition_0.png)" in card and "pipeline_tag: image-to-image" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert 'image=load_image("images/condition_0.png")' in snippet
    monkeypatch.chdir(out)
    exec(compile(snippet, "snippet", "exec"), {})
    drawn, adapter = (Image.open(out / name) for name in ("image.png", "images/adapter_0.png"))
    assert drawn.size == adapter.size == (16, 16)
    page = (out / "compare.html").read_text()
    assert page.count('class="condition small"') == 2
    assert "drawn from this picture: make it red" in page


def test_from_data_to_card_of_a_video(
    place: Path, folder_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a video the card and the page show the picture beside strips of frames, and rewards see it with each frame."""
    out = trained(place, tmp_path, monkeypatch, folder_of("ltx-i2v"), resolution=32, num_frames=9)
    for number in range(2):
        with Image.open(out / "images" / f"condition_{number}.png") as shown:
            assert shown.size == (32, 32) and shown.getpixel((16, 16)) in COLOURS.values(), "not as wide as the strip"
        with Image.open(out / "images" / f"adapter_{number}.png") as strip:
            assert strip.size == (4 * 32, 32)
    card = (out / "README.md").read_text()
    assert "![drawn from](images/condition_0.png)" in card and "pipeline_tag: image-to-video" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert 'image=load_image("images/condition_0.png")' in snippet
    monkeypatch.chdir(out)
    exec(compile(snippet, "snippet", "exec"), {})
    with Image.open(out / "video.gif") as video:
        assert video.n_frames > 1 and video.size == (32, 32)
    page = (out / "compare.html").read_text()
    assert page.count('class="condition small"') == 2 and "drawn from this picture: make it blue" in page
