"""Going back with half the rate where the reward falls: on weights of our own, and on series of rewards."""

import copy
import io
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from rlr_peft.build import BLOCK_PROMPTS, BLOCK_UPDATES, WINDOW_BLOCKS, Rollback
from rlr_peft.config import FullBPArguments
from rlr_peft.estimators import PathwiseEstimator

SAMPLES = 2 * BLOCK_PROMPTS // BLOCK_UPDATES


class Counting(PathwiseEstimator):
    """Has learnt how many updates there were."""

    updates = 0

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Any) -> None:
        self.updates = state["updates"]


class Training:
    """One weight, moved by AdamW along a constant gradient; its reward is given."""

    def __init__(self, rate: float = 0.1, warmup: int = 0) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=rate, weight_decay=0.0)
        name = "constant_with_warmup" if warmup else "constant"
        self.scheduler = get_scheduler(name, self.optimizer, num_warmup_steps=warmup, num_training_steps=100)
        self.estimator = Counting(FullBPArguments())
        self.ema = EMAModel([self.weight])
        self.rollback = Rollback([self.weight], self.optimizer, self.scheduler, self.estimator, self.ema)
        self.generator = torch.Generator().manual_seed(0)

    def update(self, reward: float, spread: float = 0.1) -> float:
        """Takes an update whose samples score so; returns the weight after it."""
        self.weight.grad = -torch.ones(3)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.step([self.weight])
        self.estimator.updates += 1
        after = float(self.weight[0])
        self.rollback.see(reward + spread * torch.randn(SAMPLES, generator=self.generator), 1)
        return after

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def test_a_clear_fall_ends_in_the_best_blocks_mean_weights_and_half_the_rate() -> None:
    training = Training()
    for reward in (0.2, *[0.6] * (WINDOW_BLOCKS - 1)):
        for _ in range(BLOCK_UPDATES):
            training.update(reward)
    best = [training.update(0.6) for _ in range(BLOCK_UPDATES)]
    state = copy.deepcopy(training.optimizer.state_dict()["state"][0])
    for _ in range(BLOCK_UPDATES - 1):
        training.update(0.4)
    assert training.rollback.halvings == 0 and training.rate == pytest.approx(0.1)
    training.update(0.4)
    assert training.rollback.halvings == 1 and training.rate == pytest.approx(0.05)
    expected = torch.full((3,), sum(best) / BLOCK_UPDATES)
    torch.testing.assert_close(training.weight.detach(), expected)
    torch.testing.assert_close(training.ema.shadow_params[0], expected)
    now = training.optimizer.state_dict()["state"][0]
    assert all(torch.equal(now[name], value) for name, value in state.items()), "the moments of then"
    assert training.estimator.updates == (1 + WINDOW_BLOCKS) * BLOCK_UPDATES
    again = [training.update(0.4) for _ in range(BLOCK_UPDATES)]  # what comes now is the new measure
    assert training.rollback.halvings == 1
    for _ in range(BLOCK_UPDATES):
        training.update(0.2)
    assert training.rollback.halvings == 2 and training.rate == pytest.approx(0.025)
    torch.testing.assert_close(training.weight.detach(), torch.full((3,), sum(again) / BLOCK_UPDATES))


def test_going_back_keeps_the_settings_of_the_config_that_a_run_was_resumed_with() -> None:
    training = Training()
    for _ in range(BLOCK_UPDATES):
        training.update(0.6)
    training.optimizer.param_groups[0].update(betas=(0.5, 0.9), weight_decay=0.2, initial_lr=0.1)
    for _ in range(BLOCK_UPDATES):
        training.update(0.2)
    assert training.rollback.halvings == 1
    (group,) = training.optimizer.param_groups
    assert group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0.2 and group["lr"] == pytest.approx(0.05)


def test_a_small_fall_and_a_rise_change_nothing() -> None:
    training, plain = Training(), Training()
    for reward in (0.2, 0.5, 0.47, 0.6):
        for _ in range(BLOCK_UPDATES):
            training.update(reward, spread=0.3)
            plain.weight.grad = -torch.ones(3)
            plain.optimizer.step()
    assert training.rollback.halvings == 0 and torch.equal(training.weight, plain.weight)


def test_a_slow_fall_shows_in_all_that_came_since_the_best_block() -> None:
    """Every block alone is within the noise."""
    training = Training()
    rewards = torch.Generator().manual_seed(1)
    halved = []
    for reward in (0.6, *[0.51] * 8):
        noise = 0.18 * torch.randn(BLOCK_UPDATES, SAMPLES, generator=rewards)
        for update in reward + noise - noise.mean():
            training.rollback.see(update, 1)
        halved.append(training.rollback.halvings)
    assert halved[1] == halved[2] == 0 and halved[-1] == 1


def test_equal_rewards_never_fall() -> None:
    training = Training()
    for samples in range(SAMPLES, SAMPLES + 40):
        training.rollback.see(torch.full((samples,), 0.1), 1)
    assert training.rollback.halvings == 0


def test_noise_alone_halves_seldom() -> None:
    """50 runs of 10 blocks without a course: the best block is a lucky one, and still few runs go back."""
    halvings = []
    for seed in range(50):
        training = Training()
        training.generator.manual_seed(seed)
        for _ in range(10 * BLOCK_UPDATES):
            training.update(0.5)
        halvings.append(training.rollback.halvings)
    assert sum(halvings) <= 5


def test_a_fall_near_the_top_shows_in_time() -> None:
    """Few prompts fail, and their number doubles, then doubles again: no single block says so."""
    found = []
    for seed in range(20):
        training, generator = Training(), torch.Generator().manual_seed(seed)
        for update in range(26 * BLOCK_UPDATES):
            chance = 0.95 if update < 14 * BLOCK_UPDATES else 0.87 if update < 18 * BLOCK_UPDATES else 0.78
            training.rollback.see(0.2 + 0.8 * (torch.rand(4, generator=generator) < chance).float(), 1)
        found.append(training.rollback.halvings > 0)
    assert sum(found) >= 14


def test_a_lucky_block_halves_once_at_most() -> None:
    """Prompts score 1 or 0.2, and all of the first block 1 by chance: nothing is ever as good again."""
    training, generator = Training(), torch.Generator().manual_seed(0)
    for block in range(30):
        for _ in range(BLOCK_UPDATES):
            prompts = 0.2 + 0.8 * (torch.rand(4, generator=generator) < (1.0 if block == 0 else 0.3)).float()
            training.rollback.see(prompts, 1)
    assert training.rollback.halvings == 1


def test_images_of_a_prompt_count_as_one() -> None:
    """Prompts of which some are hard: one in four scores low, with all of its images."""

    def halvings(group_size: int) -> int:
        count = 0
        for seed in range(20):
            training, generator = Training(), torch.Generator().manual_seed(seed)
            for _ in range(20 * BLOCK_UPDATES):
                prompts = (torch.rand(4, generator=generator) > 0.25).float()
                training.rollback.see(prompts.repeat_interleave(4), group_size)
            count += training.rollback.halvings
        return count

    assert halvings(4) <= 2 < 15 <= halvings(1)


@pytest.mark.parametrize("updates", [BLOCK_UPDATES // 2 - 1, BLOCK_UPDATES // 2])
def test_the_last_half_block_of_a_run_counts_where_it_fell(updates: int) -> None:
    training = Training()
    for _ in range(BLOCK_UPDATES):
        training.update(0.6)
    last = [training.update(0.3) for _ in range(updates)][-1]
    training.rollback.finish()
    is_back = updates == BLOCK_UPDATES // 2
    assert training.rollback.halvings == is_back and (float(training.weight[0]) != last) == is_back


def test_a_schedule_goes_on_at_half_its_height() -> None:
    training = Training(warmup=4 * BLOCK_UPDATES)
    for reward in (0.6, 0.2):
        for _ in range(BLOCK_UPDATES):
            training.update(reward)
    assert training.rate == pytest.approx(0.1 * 0.5 * 0.5)  # in the middle of the warm-up, once halved
    assert training.scheduler.get_last_lr() == [training.rate]
    training.update(0.6)
    assert training.rate == pytest.approx(0.05 * (2 * BLOCK_UPDATES + 1) / (4 * BLOCK_UPDATES))


@pytest.mark.parametrize("interrupted_after", [3, BLOCK_UPDATES + 3, 2 * BLOCK_UPDATES, 3 * BLOCK_UPDATES + 1])
def test_resumed_equals_uninterrupted(interrupted_after: int) -> None:
    rewards = [reward for reward in (0.6, 0.2, 0.7, 0.1) for _ in range(BLOCK_UPDATES)]
    whole, first, second = Training(), Training(), Training()
    for reward in rewards:
        whole.update(reward)
    for reward in rewards[:interrupted_after]:
        first.update(reward)
    file = io.BytesIO()
    torch.save([first.rollback.state_dict(), first.optimizer.state_dict(), first.scheduler.state_dict()], file)
    file.seek(0)
    rollback, optimizer, scheduler = torch.load(file, weights_only=True)
    second.rollback.load_state_dict(rollback)
    second.optimizer.load_state_dict(optimizer)
    second.scheduler.load_state_dict(scheduler)
    with torch.no_grad():
        second.weight.copy_(first.weight)
    second.generator.set_state(first.generator.get_state())
    for reward in rewards[interrupted_after:]:
        second.update(reward)
    assert second.rollback.halvings == whole.rollback.halvings == 2
    assert torch.equal(second.weight, whole.weight) and second.rate == whole.rate
