"""Rewards with a network, on tiny checkpoints in the real formats."""

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from benchmarks.reward_checkpoints import Sizes
from benchmarks.reward_parity import (
    PROMPTS,
    judge_table,
    local_files,
    markdown,
    mixed_images,
    network_parity,
    to_tensor,
)
from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    MODEL_REWARDS,
    LinearHead,
    Metadata,
    ModelFiles,
    ModelReward,
    ModelSettings,
    RewardSettings,
    load_reward,
    load_weights,
    loading,
    score_images,
    weights_dtype,
)
from rlr_peft.rewards.model_files import (
    AESTHETIC_HEAD,
    AESTHETIC_V2_5_HEAD,
    BERT,
    HPSV2,
    IMAGE_REWARD,
    LAION_CLIP,
    OPENAI_CLIP,
    SIGLIP,
)
from tests.programs import LIBRARIES, completed

IMAGE_REWARDS = ["aesthetic", "aesthetic-v2.5", "clipscore", "hpsv2", "hpsv2/v2.0", "imagereward", "pickscore"]
NEEDS_NO_PROMPT = ["aesthetic", "aesthetic-v2.5"]
REAL_HEAD = Path(__file__).parents[2].parent / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repositories")


@pytest.fixture(scope="module")
def parity(folder: Path) -> dict[str, dict[str, float]]:
    """Writes every repository and compares our scores with the published models'."""
    with torch.random.fork_rng(devices=[]):
        return network_parity(folder, Sizes())


@pytest.fixture(scope="module")
def rewards(folder: Path, parity: Any) -> dict[str, ModelReward]:
    loaded = {name: load_reward(name, settings=settings(folder)) for name in MODEL_REWARDS}
    return {name: reward for name, reward in loaded.items() if isinstance(reward, ModelReward)}


def settings(folder: Path, **values: Any) -> RewardSettings:
    return RewardSettings(ModelSettings(files=local_files(folder), **values))


def images(count: int = 4) -> torch.Tensor:
    return to_tensor(mixed_images((70, 90), count))


@pytest.mark.parametrize("name", [*IMAGE_REWARDS[:3], "pickscore", "hpsv2/v2.0", "hpsv2/v2.1", "imagereward"])
def test_scores_are_those_of_the_published_model(parity: dict[str, dict[str, float]], name: str) -> None:
    measured = parity[name]
    assert measured["spread"] > 1e-3, "scores that are all alike would prove nothing"
    assert measured["network"] < 1e-5 * max(1, measured["spread"])
    assert measured["whole"] < 0.02 * measured["spread"]


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_a_batch_is_scored_as_its_samples_are(rewards: dict[str, ModelReward], name: str) -> None:
    batch = score_images(rewards[name], images(), PROMPTS)
    single = torch.cat([score_images(rewards[name], images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    assert torch.allclose(batch, single, atol=1e-4)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_the_prompt_counts_where_it_should(rewards: dict[str, ModelReward], name: str) -> None:
    same_images = images(1).repeat(2, 1, 1, 1)
    first, second = score_images(rewards[name], same_images, ["a red fox", "boats"]).tolist()
    assert (first == pytest.approx(second, abs=1e-6)) == (name in NEEDS_NO_PROMPT)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_gradients_match_finite_differences(rewards: dict[str, ModelReward], name: str) -> None:
    reward = rewards[name]
    pixels = (0.35 + 0.3 * images(2)).requires_grad_(True)  # off the clamps
    (gradient,) = torch.autograd.grad(score_images(reward, pixels, PROMPTS[:2]).sum(), pixels)
    assert all(float(sample.abs().sum()) > 0 for sample in gradient)
    direction = gradient / gradient.norm()
    step = 0.05
    with torch.no_grad():
        ahead, behind = (
            score_images(reward, pixels + sign * step * direction, PROMPTS[:2]).double().sum() for sign in (1, -1)
        )
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("name", list(MODEL_REWARDS))
def test_weights_are_frozen_and_in_evaluation_mode(rewards: dict[str, ModelReward], name: str) -> None:
    network = rewards[name].network
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    assert rewards[name].differentiable


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_float16_weights_give_nearly_the_same_gradient(
    rewards: dict[str, ModelReward], folder: Path, name: str
) -> None:
    half: Any = load_reward(name, settings=settings(folder, dtype=weights_dtype("auto", torch.device("cuda"))))
    assert torch.float16 in {parameter.dtype for parameter in half.network.parameters()}
    gradients = []
    for reward in (rewards[name], half):
        pixels = images().requires_grad_()
        gradients += torch.autograd.grad(score_images(reward, pixels, PROMPTS).sum(), pixels)
    assert float(torch.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0)) > 0.999


def test_weights_are_in_half_precision_on_a_gpu_alone_unless_told() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [weights_dtype("auto", device) for device in (gpu, cpu)] == [torch.float16, torch.float32]
    assert [weights_dtype("bf16", device) for device in (gpu, cpu)] == [torch.bfloat16] * 2


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_bfloat16_weights_give_nearly_the_same_float32_scores(
    rewards: dict[str, ModelReward], folder: Path, name: str
) -> None:
    half: Any = load_reward(name, settings=settings(folder, dtype=torch.bfloat16))
    expected = score_images(rewards[name], images(), PROMPTS)
    got = score_images(half, images(), PROMPTS)
    assert got.dtype == torch.float32
    assert torch.bfloat16 in {parameter.dtype for parameter in half.network.parameters()}
    assert (got - expected).abs().max() < 0.3 * max(expected.std().item(), 0.05)


def test_hpsv2_means_its_newest_version(rewards: dict[str, ModelReward]) -> None:
    assert rewards["hpsv2"].name == "hpsv2/v2.1"
    scores = [score_images(rewards[name], images(), PROMPTS) for name in ("hpsv2", "hpsv2/v2.1", "hpsv2/v2.0")]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("name", ["aesthetic", "aesthetic-v2.5", "clipscore", "hpsv2", "pickscore"])
def test_image_features_are_those_that_are_scored(rewards: dict[str, ModelReward], name: str) -> None:
    reward: Any = rewards[name]
    features = reward.image_features(images().requires_grad_(True))
    assert features.dtype == torch.float32 and features.ndim == 2 and not features.requires_grad
    network, directions = reward.network, torch.nn.functional.normalize(features, dim=1)
    if name in NEEDS_NO_PROMPT:
        expected = network["head"](directions)
    else:
        length = network.config.text_config.max_position_embeddings
        text = reward._tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            of_text = network.get_text_features(input_ids=text.input_ids).pooler_output
        expected = (directions * torch.nn.functional.normalize(of_text, dim=1)).sum(1)
        factor = {"clipscore": 100.0, "pickscore": network.logit_scale.exp().item()}.get(name, 1.0)
        expected = expected * factor
    torch.testing.assert_close(expected, score_images(reward, images(), PROMPTS), rtol=1e-4, atol=1e-4)


class PlaceLog(ModelReward):
    """Notes where its network is put, in the order in which it happens."""

    def __init__(self, offload: bool) -> None:
        self.log: list[str] = []
        super().__init__("noted", ModelSettings(torch.device("cpu:0"), offload=offload), torch.nn.Linear(3, 1))

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Metadata) -> torch.Tensor:
        self.log.append("scored")
        scores: torch.Tensor = self.network(images.mean((2, 3))).squeeze(1)
        if scores.requires_grad:
            scores.register_hook(lambda gradient: self.log.append("differentiated"))
        return scores

    def _place(self, device: torch.device) -> None:
        self.log.append("device" if device.index == 0 else "home")
        super()._place(device)


def test_an_offloaded_network_comes_for_the_call_and_leaves_after_its_backward_pass() -> None:
    reward = PlaceLog(offload=True)
    with torch.no_grad():
        score_images(reward, torch.rand(2, 3, 4, 4), ["a", "b"])
    assert reward.log == ["home", "device", "scored", "home"]
    reward.log.clear()
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = score_images(reward, pixels, ["a", "b"])
    assert reward.log == ["device", "scored"]
    torch.autograd.grad(scores.sum(), pixels)
    assert reward.log == ["device", "scored", "differentiated", "home"]


def test_a_network_that_is_not_offloaded_stays() -> None:
    reward = PlaceLog(offload=False)
    score_images(reward, torch.rand(2, 3, 4, 4), ["a", "b"])
    assert "home" not in reward.log


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelFiles:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return ModelFiles(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "repository", "files"),
    [
        ("aesthetic", "openai/clip-vit-large-patch14", "config.json model.safetensors"),
        ("aesthetic-v2.5", "google/siglip-so400m-patch14-384", "config.json model.safetensors"),
        ("pickscore", "yuvalkirstain/PickScore_v1", "config.json model.safetensors"),
        ("hpsv2/v2.0", "xswu/HPSv2", "HPS_v2_compressed.pt"),
        ("hpsv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("imagereward", "zai-org/ImageReward", "ImageReward.pt"),
        ("subject-consistency", "facebook/dino-vitb16", "config.json model.safetensors"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_gets_it(
    offline: ModelFiles, name: str, repository: str, files: str
) -> None:
    with pytest.raises(RewardError) as caught:
        load_reward(name, settings=RewardSettings(ModelSettings(files=offline)))
    message = str(caught.value)
    assert f"`hf download {repository} {files}`" in message
    assert "not in the local cache" in message and f"--reward_model_path '{{{repository}: /path" in message


def test_a_file_that_is_not_on_the_hub_is_named_with_its_address(folder: Path, parity: Any) -> None:
    files = ModelFiles({SIGLIP: str(folder / "siglip")})
    with pytest.raises(RewardError) as caught:
        load_reward("aesthetic-v2.5", settings=RewardSettings(ModelSettings(files=files)))
    address = "github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"
    assert f"`curl -LO https://{address}`" in str(caught.value)
    assert f"'{{{AESTHETIC_V2_5_HEAD}: /path/to/aesthetic_predictor_v2_5.pth}}'" in str(caught.value)


HUB = """
    import sys
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    ANSWERS = {"gated": (403, "GatedRepo"), "gone": (404, "RepoNotFound"), "bare": (404, "EntryNotFound")}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, code = next((ANSWERS[key] for key in ANSWERS if key in self.path), (200, None))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    import os
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

    from rlr_peft.rewards.scores import RewardError
    from rlr_peft.rewards.model_files import ModelFiles

    for repo in ("o/gated", "o/gone", "o/bare"):
        try:
            ModelFiles(cache_dir=sys.argv[1]).find("mine", repo, "weights.safetensors", "weights.pt")
        except RewardError as error:
            print(error)
"""


def test_gated_absent_and_incomplete_repositories_are_told_apart(tmp_path: Path) -> None:
    """The real client against a loopback Hub that answers with the Hub's error codes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path)}
    done = completed(["-c", textwrap.dedent(HUB), tmp_path / "cache"], environment, LIBRARIES)
    gated, gone, bare = done.stdout.strip().splitlines()
    assert "o/gated, which is gated: accept its terms on https://huggingface.co/o/gated" in gated
    assert "o/gone, which was not found, or is private" in gone
    assert "weights.pt of the Hub repository o/bare, which has no such file" in bare
    assert all("`hf download o/" in line for line in (gated, gone, bare))


def test_why_a_file_cannot_be_had_is_said() -> None:
    files = ModelFiles({HPSV2: "my models/hps"})
    with pytest.raises(RewardError, match=r"my models/hps, which cannot be read: Repo id must .*ValidationError"):
        load_reward("hpsv2", settings=RewardSettings(ModelSettings(files=files)))


def test_loading_gives_the_progress_bars_and_the_logging_level_back(tmp_path: Path) -> None:
    level = logging.get_verbosity()
    for switch in (logging.disable_progress_bar, logging.enable_progress_bar):
        switch()
        before = logging.is_progress_bar_enabled()
        with loading("mine", tmp_path):
            assert not logging.is_progress_bar_enabled() and logging.get_verbosity() > logging.ERROR
        assert logging.is_progress_bar_enabled() is before and logging.get_verbosity() == level


def test_a_local_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"expected HPS_v2.1_compressed.safetensors or HPS_v2.1_compressed.pt in /"):
        load_reward("hpsv2", settings=RewardSettings(ModelSettings(files=ModelFiles({HPSV2: str(tmp_path)}))))


def test_a_local_path_that_is_not_there_is_named() -> None:
    files = ModelFiles({OPENAI_CLIP: "./no/such/folder"})
    with pytest.raises(RewardError, match=r"in the place of openai/clip-vit-large-patch14, got ./no/such/folder"):
        load_reward("clipscore", settings=RewardSettings(ModelSettings(files=files)))


def test_a_file_may_stand_for_a_repository_and_safetensors_come_first(folder: Path, parity: Any) -> None:
    weights = load_weights("aesthetic", folder / "head" / "aesthetic-model.pth")
    doubled = {name: value * (2 if name.startswith("layers.7") else 1) for name, value in weights.items()}
    scores = []
    for name, place in (("pickled", folder / "head"), ("alone", folder / "doubled.pth"), ("both", folder / "both")):
        if name == "alone":
            torch.save(doubled, place)
        elif name == "both":
            place.mkdir()
            torch.save(weights, place / "aesthetic-model.pth")
            save_file(doubled, place / "aesthetic-model.safetensors")
        files = ModelFiles({OPENAI_CLIP: str(folder / "openai"), AESTHETIC_HEAD: str(place)})
        scores.append(
            score_images(
                load_reward("aesthetic", settings=RewardSettings(ModelSettings(files=files))), images(), PROMPTS
            )
        )
    assert torch.allclose(scores[1], 2 * scores[0], atol=1e-5)
    assert torch.equal(scores[1], scores[2])


class Payload:
    def __reduce__(self) -> Any:
        return (os.system, ("touch should_not_exist",))


@pytest.mark.parametrize("content", [b"not a checkpoint", Payload()], ids=["garbage", "code"])
def test_damaged_files_and_files_that_hold_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "HPS_v2.1_compressed.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    files = ModelFiles({HPSV2: str(path), LAION_CLIP: str(path)})
    with pytest.raises(RewardError, match=r"'hpsv2/v2.1': .*HPS_v2.1_compressed.pt cannot be read as weights"):
        load_reward("hpsv2", settings=RewardSettings(ModelSettings(files=files)))
    assert not (tmp_path / "should_not_exist").exists()


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_a_file_without_names_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save([torch.zeros(2)], path)
    files = ModelFiles(dict.fromkeys((HPSV2, LAION_CLIP, IMAGE_REWARD, BERT), str(path)))
    with pytest.raises(RewardError, match=r"expected weights by name in .*weights.pt, got list"):
        load_reward(name, settings=RewardSettings(ModelSettings(files=files)))


def test_a_head_for_another_model_is_refused_when_it_is_loaded(folder: Path, parity: Any, tmp_path: Path) -> None:
    width = load_weights("aesthetic", folder / "head" / "aesthetic-model.pth")["layers.0.weight"].shape[1]
    path = tmp_path / "wide.pth"
    torch.save({"layers.0.weight": torch.zeros(1, 2 * width), "layers.0.bias": torch.zeros(1)}, path)
    files = ModelFiles({OPENAI_CLIP: str(folder / "openai"), AESTHETIC_HEAD: str(path)})
    with pytest.raises(RewardError, match=f"wide.pth is a head for features of {2 * width} numbers, .* gives {width}"):
        load_reward("aesthetic", settings=RewardSettings(ModelSettings(files=files)))


@pytest.mark.parametrize(
    ("name", "place", "file"),
    [
        ("hpsv2", "hps", "HPS_v2.1_compressed.pt"),
        ("imagereward", "blip", "ImageReward.pt"),
        ("aesthetic", "head", "aesthetic-model.pth"),
    ],
)
@pytest.mark.parametrize("spoil", ["one missing", "one unknown", "another model"])
def test_a_checkpoint_of_something_else_is_refused(
    folder: Path, parity: Any, tmp_path: Path, name: str, place: str, file: str, spoil: str
) -> None:
    weights = torch.load(folder / place / file, weights_only=True)
    weights = dict(weights.get("state_dict", weights))
    key = next(key for key in reversed(weights) if "bias" in key)
    if spoil == "one missing":
        del weights[key]
    elif spoil == "one unknown":
        weights["something.else"] = torch.zeros(1)
    else:
        weights = {"fc.weight": torch.zeros(2, 2)}
    torch.save(weights, tmp_path / file)
    files = local_files(folder)
    repository = next(repo for repo, path in files._replacements.items() if path == str(folder / place))
    files._replacements[repository] = str(tmp_path / file)
    with pytest.raises(RewardError, match=f"{name.split('/')[0]}.*(weights missing|cannot be loaded)"):
        load_reward(name, settings=RewardSettings(ModelSettings(files=files)))


def test_the_documentation_holds_the_measured_parity() -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "results" / "reward_parity.json").read_text())
    page = (root / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert markdown(results) in page and judge_table(results) in page


def test_full_depth_imagereward_has_the_published_621_names() -> None:
    from benchmarks.reward_references_bert import ReferenceImageReward

    with torch.device("meta"):
        model = ReferenceImageReward(30524, size=224, patch=16, vision_width=1024, text_width=768, depth=(24, 12))
    assert len(model.state_dict()) == 621


@pytest.mark.skipif(not REAL_HEAD.exists(), reason=f"the real aesthetic head is not at {REAL_HEAD}")
def test_the_real_aesthetic_head_is_one_affine_map_with_the_known_norm_and_offset() -> None:
    head = LinearHead("aesthetic", REAL_HEAD, load_weights("aesthetic", REAL_HEAD), 768).double()
    with torch.no_grad():
        offset = head(torch.zeros(1, 768, dtype=torch.float64))
        direction = head(torch.eye(768, dtype=torch.float64)) - offset
        features = torch.randn(5, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        unit = features / features.norm(dim=1, keepdim=True)
        assert torch.allclose(head(unit), unit @ direction + offset, atol=1e-10)
    assert direction.norm().item() == pytest.approx(17.996, abs=5e-4)
    assert offset.item() == pytest.approx(5.2366, abs=5e-5)
