"""Rewards from files and modules that a user wrote."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from rlr_peft.errors import RewardError
from rlr_peft.rewards import CallableReward, load_reward, score_images

IMAGES = torch.linspace(0, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
PROMPTS = ["one", "two", "three", "four"]
METADATA = [{"weight": float(index)} for index in range(4)]


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(
        dedent("""
        from dataclasses import dataclass
        import torch

        def brightness(images, prompts):
            return images.mean(dim=(1, 2, 3))

        def weighted(images, prompts, metadata):
            return images.mean(dim=(1, 2, 3)) * torch.tensor([entry["weight"] for entry in metadata])

        def keyword_only(images, prompts, *, metadata):
            return [entry["weight"] for entry in metadata]

        def with_a_knob(images, prompts, scale=2.0):
            return scale * images.mean(dim=(1, 2, 3))

        def through_numpy(images, prompts):
            return images.numpy().mean(axis=(1, 2, 3)), {"note": "info is dropped"}

        def rounded(images, prompts):
            return [float(image.mean().item()) for image in images]

        def in_place(images, prompts):
            return images.mul_(2).mean(dim=(1, 2, 3))

        @torch.no_grad()
        def without_gradient(images, prompts):
            return images.mean(dim=(1, 2, 3))

        def promises_too_much(images, prompts):
            return images.detach().mean(dim=(1, 2, 3))

        promises_too_much.differentiable = True

        def declared(images, prompts):
            return images.mean(dim=(1, 2, 3))

        declared.differentiable = False

        def oddly_declared(images, prompts):
            return images.mean(dim=(1, 2, 3))

        oddly_declared.differentiable = "yes"

        def fails(images, prompts):
            raise KeyError("missing key")

        def noisy(images, prompts):
            return images.mean(dim=(1, 2, 3)) + torch.rand(len(images))

        def one_argument(images):
            return images.mean(dim=(1, 2, 3))

        @dataclass
        class Counter:
            calls: int = 0

            def __call__(self, images, prompts):
                self.calls += 1
                return torch.full((len(images),), float(self.calls))

        class NeedsArguments:
            def __init__(self, path):
                pass

            def __call__(self, images, prompts):
                return torch.zeros(len(images))

        class Head(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))
                self.dropout = torch.nn.Dropout(0.5)

            def forward(self, images, prompts, metadata):
                return self.dropout(images).mean(dim=(1, 2, 3)) * self.weight

        number = 3
    """)
    )
    return path


def load(path: Path, name: str) -> CallableReward:
    reward = load_reward(f"{path}:{name}")
    assert isinstance(reward, CallableReward)
    return reward


def brightness() -> torch.Tensor:
    return IMAGES.mean(dim=(1, 2, 3))


def test_a_function_in_a_file(reward_file: Path) -> None:
    reward = load(reward_file, "brightness")
    assert reward.name == "my_rewards.py:brightness"  # no folder: this name is published
    assert torch.equal(score_images(reward, IMAGES, PROMPTS), brightness())


def test_a_function_in_a_module(reward_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = reward_file.parent / "a_package_of_rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text(reward_file.read_text())
    monkeypatch.syspath_prepend(str(reward_file.parent))
    reward = load_reward("a_package_of_rewards.inner:brightness")
    assert reward.name == "a_package_of_rewards.inner:brightness"
    assert torch.equal(score_images(reward, IMAGES, PROMPTS), brightness())


def test_metadata_reaches_those_that_ask_for_it(reward_file: Path) -> None:
    weights = torch.arange(4.0)
    assert torch.equal(score_images(load(reward_file, "weighted"), IMAGES, PROMPTS, METADATA), brightness() * weights)
    assert torch.equal(score_images(load(reward_file, "keyword_only"), IMAGES, PROMPTS, METADATA), weights)


def test_a_third_argument_with_a_default_is_a_knob_and_not_the_metadata(reward_file: Path) -> None:
    scores = score_images(load(reward_file, "with_a_knob"), IMAGES, PROMPTS, METADATA)
    assert torch.equal(scores, 2 * brightness())


def test_a_class_is_instantiated_once_and_keeps_its_state(reward_file: Path) -> None:
    reward = load(reward_file, "Counter")
    assert score_images(reward, IMAGES, PROMPTS).tolist() == [1.0] * 4
    assert score_images(reward, IMAGES, PROMPTS).tolist() == [2.0] * 4


def test_a_torch_module_is_frozen_and_in_evaluation_mode(reward_file: Path) -> None:
    reward = load(reward_file, "Head")
    images = IMAGES.clone().requires_grad_()
    scores = score_images(reward, images, PROMPTS)
    assert torch.allclose(scores, brightness())  # no dropout
    assert reward.differentiable
    assert torch.autograd.grad(scores.sum(), images)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brightness", True),
        ("weighted", True),
        ("in_place", True),
        ("through_numpy", False),
        ("rounded", False),
        ("without_gradient", False),
        ("Counter", False),
        ("declared", False),
        ("promises_too_much", True),
    ],
)
def test_differentiability_is_declared_or_found_on_the_first_images(
    reward_file: Path, name: str, expected: bool
) -> None:
    reward = load(reward_file, name)
    before = IMAGES.clone()
    assert reward.settle(IMAGES, PROMPTS, METADATA) is expected
    assert reward.differentiable is expected
    assert torch.equal(before, IMAGES)


@pytest.mark.parametrize("declared", [None, True, False])
def test_code_that_changes_images_in_place_changes_its_own_copy(reward_file: Path, declared: bool | None) -> None:
    reward = load(reward_file, "in_place")
    reward.differentiable = declared
    latents = IMAGES.clone().requires_grad_()
    images = latents * 1  # decoded images are no leaf of the graph either
    scores = score_images(reward, images, PROMPTS)
    assert torch.allclose(scores, 2 * brightness()) and torch.equal(images, IMAGES)
    if declared is not False:
        (gradient,) = torch.autograd.grad(scores.sum(), latents)
        assert torch.allclose(gradient, torch.full_like(IMAGES, 2 / 192))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without_gradient", "cut off from the images"),
        ("through_numpy", "Can't call numpy()"),
        ("brightness", None),
        ("declared", None),
    ],
)
def test_a_gradient_that_is_missed_is_said_once(
    reward_file: Path, name: str, message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    reward = load(reward_file, name)
    for _ in range(2):
        reward.settle(IMAGES, PROMPTS, METADATA)
    if message is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert message in record.getMessage() and f"my_rewards.py:{name}" in record.getMessage()


def test_it_is_not_known_before_the_first_images_unless_it_is_declared(reward_file: Path) -> None:
    assert load(reward_file, "brightness").differentiable is None
    assert load(reward_file, "declared").differentiable is False


def test_the_trial_happens_once_and_leaves_the_random_state_alone(reward_file: Path) -> None:
    reward = load(reward_file, "noisy")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert reward.settle(IMAGES, PROMPTS, METADATA)
    assert torch.equal(torch.get_rng_state(), state)
    counter = load(reward_file, "Counter")
    for _ in range(3):
        counter.settle(IMAGES, PROMPTS, METADATA)
    assert score_images(counter, IMAGES, PROMPTS).tolist() == [2.0] * 4


def test_images_with_gradient_reach_code_that_cannot_take_them_detached(reward_file: Path) -> None:
    scores = score_images(load(reward_file, "through_numpy"), IMAGES.clone().requires_grad_(), PROMPTS)
    assert torch.allclose(scores, brightness())
    assert not scores.requires_grad


def test_gradient_flows_through_a_user_function(reward_file: Path) -> None:
    images = IMAGES.clone().requires_grad_()
    score_images(load(reward_file, "brightness"), images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, torch.full_like(IMAGES, 1 / 192))


def test_a_broken_promise_of_a_gradient_is_an_error(reward_file: Path) -> None:
    with pytest.raises(RewardError, match="says it is differentiable"):
        score_images(load(reward_file, "promises_too_much"), IMAGES.clone().requires_grad_(), PROMPTS)


def test_an_exception_names_the_reward_and_keeps_its_cause(reward_file: Path) -> None:
    with pytest.raises(RewardError, match=r"'my_rewards.py:fails' raised KeyError: 'missing key'") as caught:
        score_images(load(reward_file, "fails"), IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="raised KeyError"):
        load(reward_file, "fails").settle(IMAGES, PROMPTS, METADATA)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brightnes", "has no 'brightnes'; did you mean brightness"),
        ("xyz", "has no 'xyz'; it has: .*Counter.*brightness"),
        ("number", "expected a function or a callable object .* got int"),
        ("NeedsArguments", "cannot be instantiated without arguments: TypeError"),
        ("one_argument", r"expected a callable taking \(images, prompts\).*got \(images\)"),
        ("oddly_declared", "must be True or False, got 'yes'"),
        ("", "expected `package.module:callable`"),
    ],
)
def test_what_cannot_be_loaded_from_a_file(reward_file: Path, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load(reward_file, name)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"absent\.py' does not exist"):
        load_reward(f"{tmp_path}/absent.py:f")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(RewardError, match="is a folder"):
        load_reward(f"{tmp_path}/folder.py:f")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match="failed while it was imported: SyntaxError"):
        load_reward(f"{tmp_path}/broken.py:f")
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    modules = set(sys.modules)
    with pytest.raises(RewardError, match="ModuleNotFoundError: No module named 'a_package_that_nobody_has'"):
        load_reward(f"{tmp_path}/needy.py:f")
    assert set(sys.modules) == modules


def test_modules_that_are_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needy_module.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "failing_module.py").write_text("1 / 0\n")
    with pytest.raises(RewardError, match=r"module 'no_such_module\.inner' was not found .*PYTHONPATH"):
        load_reward("no_such_module.inner:f")
    with pytest.raises(RewardError, match="needs 'a_package_that_nobody_has', which is not installed"):
        load_reward("needy_module:f")
    with pytest.raises(RewardError, match="failed while it was imported: ZeroDivisionError"):
        load_reward("failing_module:f")


def test_the_same_file_loaded_twice_gives_two_independent_rewards(reward_file: Path) -> None:
    first, second = load(reward_file, "Counter"), load(reward_file, "Counter")
    score_images(first, IMAGES, PROMPTS)
    assert score_images(second, IMAGES, PROMPTS).tolist() == [1.0] * 4
