"""``DiffusiveChainOfThought`` draws what training drew, bit for bit, with and without an adapter."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml

import train_rlr_lora
from rlr_peft.build import derive_seed
from rlr_peft.config import ConfigError
from rlr_peft.inference import DiffusiveChainOfThought
from rlr_peft.prompt import Prompt, PromptError
from rlr_peft.prompts import decompose_by_rules
from tests.families.table import CASES, VIDEOS, load
from tests.pipelines import tiny_stable_diffusion

# Keeps every image that training shows it.
REWARD = """
from pathlib import Path
import torch

class Keeping:
    differentiable, takes_video = True, VIDEO

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        folder = Path(metadata[0]["folder"])
        seen = {"images": images.detach().clone(), "prompts": [str(prompt) for prompt in prompts]}
        torch.save(seen, folder / f"{self.calls}.pt")
        self.calls += 1
        return images[..., 0, :, :].flatten(1).mean(1)
"""
STAGED = {
    "red ball": {"layout": "a wide sky", "object": "a red ball", "detail": "shiny leather"},
    "blue box": {"layout": "an empty room", "object": "a blue box", "detail": "scratched paint"},
}
SD_AND_FLOW = ["sd-v", "sd3", "flux-true-cfg", "wan-2.1"]


def train(name: str, base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two updates with stage prompts from columns; an adapter after each."""
    seen = folder / "seen"
    seen.mkdir()
    rows = [{"text": text, **stages, "folder": str(seen)} for text, stages in STAGED.items()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD.replace("VIDEO", str(name in VIDEOS)))
    config: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "prompt_path": str(folder / "prompts.jsonl"),
        "dcot_columns": ["layout", "object", "detail"],
        "dcot_fractions": [0.5, 0.25, 0.25],
        "metadata_columns": ["folder"],
        "reward_fn": f"{folder / 'reward.py'}:Keeping",
        "num_inference_steps": 4,
        "step_kind": "cps",
        "eta": 0.6,
        "estimator": "rlr",
        "fo_steps": 1,
        "train_batch_size": 2,
        "num_images_per_prompt": 2,
        "learning_rate": 0.05,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "none",
        "skip_final_inference": True,
        "output_dir": str(folder / "out"),
        **CASES[name].options,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train_rlr_lora.py", "--config", str(folder / "run.yaml")])
    with torch.random.fork_rng(devices=[]):
        assert train_rlr_lora.main() == 0
    return folder / "out"


@pytest.mark.parametrize("name", SD_AND_FLOW)
def test_the_images_of_training(
    name: str, folder_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(name, folder_of(name), tmp_path, monkeypatch)
    for update in range(2):
        seen = torch.load(tmp_path / "seen" / f"{update}.pt", weights_only=True)
        pipeline = load(folder_of(name))
        if update:  # the second update drew with what the first had learnt
            pipeline.load_lora_weights(str(out / f"checkpoint-{update}"))
        dcot = DiffusiveChainOfThought.from_config(pipeline, out / "config.yaml")
        stages = [tuple(STAGED[text].values()) for text in seen["prompts"]]
        drawn = dcot(stages, seeds=[derive_seed(0, "samples", update, i) for i in range(2)], output_type="pt")
        assert drawn.stage_prompts == stages
        assert torch.equal(drawn.frames if name in VIDEOS else drawn.images, seen["images"]), update
    assert seen["images"].std() > 0.01, "constant images would prove nothing"


@pytest.fixture(scope="module")
def dcot() -> DiffusiveChainOfThought:
    pipeline = tiny_stable_diffusion("v_prediction", timestep_spacing="trailing")
    return DiffusiveChainOfThought(pipeline, num_inference_steps=3, guidance_scale=3.0)


def test_whatever_people_give(dcot: DiffusiveChainOfThought) -> None:
    stages = {"coarse": "sky", "mid": "a red kite", "fine": "silk"}
    by_name = dcot(stages, output_type="pt")
    for same in (
        [tuple(stages.values())],
        tuple(stages.values()),
        MappingProxyType(stages),
        [Prompt("x", stages=tuple(stages.values()))],
    ):
        assert torch.equal(by_name.images, dcot(same, seeds=[0], output_type="pt").images)
    assert by_name.stage_prompts == [("sky", "a red kite", "silk")]
    by_rules = dcot(["a kite, on a beach, intricate silk", "sky"], seeds=[0, 7])
    assert by_rules.stage_prompts[0] == (*["a kite, on a beach"] * 2, "a kite, on a beach, intricate silk")
    assert [image.size for image in by_rules.images] == [(16, 16)] * 2 and by_rules.frames is None
    text = dcot("sky", output_type="pt")
    assert torch.equal(text.images, dcot(dict.fromkeys(stages, "sky"), output_type="pt").images)
    assert not torch.equal(text.images, by_name.images)


def test_several_images_of_a_prompt_lie_side_by_side(dcot: DiffusiveChainOfThought) -> None:
    stages = {"coarse": "sky", "mid": "a red kite", "fine": "silk"}
    drawn = dcot([stages, "sky"], num_images_per_prompt=2, output_type="pt")
    assert drawn.stage_prompts == [("sky", "a red kite", "silk")] * 2 + [("sky",) * 3] * 2
    assert torch.equal(drawn.images, dcot([stages, stages, "sky", "sky"], seeds=range(4), output_type="pt").images)
    assert not torch.equal(drawn.images[0], drawn.images[1])
    one = dcot("sky", seeds=3, output_type="pt").images
    assert torch.equal(one, dcot(["sky"], seeds=[3], output_type="pt").images)


def test_negative_prompts_and_no_guidance(dcot: DiffusiveChainOfThought) -> None:
    pipeline, stages = dcot.chain.pipeline, ("sky", "a red kite", "silk")
    images = {
        (scale, negative): DiffusiveChainOfThought(
            pipeline, num_inference_steps=3, guidance_scale=scale, negative_prompt=negative
        )(stages, output_type="pt").images
        for scale in (1.0, 3.0)
        for negative in (None, "blurry")
    }
    assert torch.equal(images[3.0, None], dcot(stages, output_type="pt").images)
    own = dcot(Prompt("a", "blurry", stages), output_type="pt").images
    assert torch.equal(own, images[3.0, "blurry"]) and not torch.equal(own, images[3.0, None])
    assert torch.equal(images[1.0, None], images[1.0, "blurry"])
    assert not torch.equal(images[1.0, None], images[3.0, None])


def test_a_contrast_is_the_whole_prompt_against_the_rest_of_it(dcot: DiffusiveChainOfThought, tmp_path: Path) -> None:
    pipeline, prompt = dcot.chain.pipeline, "a kite, on a beach, intricate silk"
    chain = DiffusiveChainOfThought(pipeline, num_inference_steps=3, guidance_scale=3.0, form="contrast")
    conditions = chain.chain._conditioned([Prompt(prompt, stages=decompose_by_rules(prompt))], range(3, 0, -1))
    steered = [(one.text, one.negative_prompt) for _, (one,) in conditions]
    assert steered == [(prompt, "a kite, intricate silk"), (prompt, None), (prompt, "a kite, on a beach")]
    drawn = chain(prompt, output_type="pt").images
    for other in (prompt, (prompt,) * 3):
        assert not torch.equal(drawn, dcot(other, output_type="pt").images)
    (tmp_path / "config.yaml").write_text(f"dcot_rules: true\ndcot_form: contrast\n{CONFIG}")
    again = DiffusiveChainOfThought.from_config(pipeline, tmp_path / "config.yaml")
    assert torch.equal(again(prompt, output_type="pt").images, drawn)


CONFIG = "num_inference_steps: 3\nguidance_scale: 3.0\n"
KITE = {"prompt": "a kite, silk", "coarse": "c", "mid": "m", "fine": "f"}
WHOLE, BY_RULES, KEPT = ("a kite, silk",) * 3, decompose_by_rules("a kite, on a beach"), ("c", "m", "f")


@pytest.mark.parametrize(
    ("source", "file", "prompt", "expected"),
    [
        ("dcot_rules: true", None, "a kite, on a beach", BY_RULES),
        ("dcot_rules: true\ndcot_cache: FOLDER/edited.jsonl", "edited.jsonl", "a kite, silk", KEPT),
        ("dcot_rules: true\ndcot_cache: FOLDER/edited.jsonl", "edited.jsonl", "a kite, on a beach", BY_RULES),
        ("dcot_columns: [coarse, mid, fine]", None, "a kite, silk", WHOLE),
        ("dcot_model: some/model", "stage_prompts.jsonl", "a kite, silk", KEPT),
        ("dcot_endpoint: http://h/v1\ndcot_endpoint_model: m", "stage_prompts.jsonl", "a kite, silk", KEPT),
    ],
)
def test_a_plain_text_is_split_as_the_run_did(
    dcot: DiffusiveChainOfThought, tmp_path: Path, source: str, file: str | None, prompt: str, expected: tuple[str, ...]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG + source.replace("FOLDER", str(tmp_path)))
    if file is not None:
        (tmp_path / file).write_text(json.dumps(KITE) + "\n")
    before = sorted(tmp_path.rglob("*"))
    draw = DiffusiveChainOfThought.from_config(dcot.chain.pipeline, tmp_path / "config.yaml")
    drawn = draw(prompt, output_type="pt")
    assert drawn.stage_prompts == [expected]
    assert torch.equal(drawn.images, dcot(expected, output_type="pt").images)
    assert sorted(tmp_path.rglob("*")) == before and (file is None or (tmp_path / file).read_text().count("\n") == 1)


def test_what_a_model_did_not_split_is_refused_and_not_split_by_rules(
    dcot: DiffusiveChainOfThought, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG + "dcot_model: some/model\n")
    draw = DiffusiveChainOfThought.from_config(dcot.chain.pipeline, tmp_path / "config.yaml")
    with pytest.raises(PromptError, match=r"stage prompts of 'a cat' in .*stage_prompts.jsonl, .* those of some/model"):
        draw("a cat")
    assert draw(("a", "b", "c")).stage_prompts == [("a", "b", "c")]


def test_a_config_from_elsewhere_imports_connects_and_writes_nothing(
    dcot: DiffusiveChainOfThought, tmp_path: Path
) -> None:
    """A device without end is no file of stage prompts, and a value of another type is an error with its name."""
    hostile = f"reward_fn: {tmp_path}/evil.py:f\ncache_dir: {tmp_path}/cache\noutput_dir: {tmp_path}/out\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        source = f"dcot_endpoint: {url}\ndcot_endpoint_model: m\ndcot_cache: /dev/zero\n"
        (tmp_path / "config.yaml").write_text(CONFIG + hostile + source)
        draw = DiffusiveChainOfThought.from_config(dcot.chain.pipeline, tmp_path / "config.yaml")
        with pytest.raises(PromptError, match="expected the stage prompts of 'a cat' in /dev/zero"):
            draw("a cat")
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    (tmp_path / "config.yaml").write_text(CONFIG + "dcot_rules: true\ndenoiser: 3\n")
    with pytest.raises(ConfigError, match="denoiser: expected a text or null, got 3"):
        DiffusiveChainOfThought.from_config(dcot.chain.pipeline, tmp_path / "config.yaml")


def test_what_it_refuses(dcot: DiffusiveChainOfThought, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="expected the keys coarse, mid, fine, got coarse, end"):
        dcot({"coarse": "a", "end": "b"})
    with pytest.raises(ValueError, match="Expected one seed for each of 2 samples, got 1"):
        dcot(["a", "b"], seeds=[1])
    with pytest.raises(ValueError, match="Expected output_type pil or pt, got latent"):
        dcot("a", output_type="latent")
    for nothing in ({"prompt": []}, {"prompt": "a", "num_images_per_prompt": 0}):
        with pytest.raises(ValueError, match="Expected one prompt or more and num_images_per_prompt of 1 or more, got"):
            dcot(**nothing)  # type: ignore[arg-type]
    for word in ("generator", "negative_prompt", "guidance_scale"):
        with pytest.raises(TypeError, match=rf"Expected no {word} here: give seeds=\[...\] in place of a generator"):
            dcot("a", **{word: None})
    with pytest.raises(PromptError, match="expected one text for each of coarse, mid, fine, got 2"):
        dcot(("a", "b"))
    other = DiffusiveChainOfThought(dcot.chain.pipeline, stages=("early", "late"), num_inference_steps=2)
    with pytest.raises(PromptError, match=r"expected the stage prompts of 'a' \(early, late\)"):
        other("a")
    (tmp_path / "plain.yaml").write_text("num_inference_steps: 2\n")
    with pytest.raises(ValueError, match="Expected the config of a run with stage prompts"):
        DiffusiveChainOfThought.from_config(dcot.chain.pipeline, tmp_path / "plain.yaml")
