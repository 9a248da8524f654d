"""`learning_rate: auto`: the first update changes the images by the set amount; where the reward falls, half of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlr_peft.build import Run, optimizer
from rlr_peft.training import finish, read_metrics, resume, take_update
from rlr_peft.training.learning_rate import CHANGE, MOST_STEPS, SAMPLES, TRIES, aimed_change
from tests.training.runs import WEIGHTS, build, config_file, train_here

VALUES = {"estimator": "full-bp", "learning_rate": "auto", "max_train_steps": 4, "num_inference_steps": 3}
LATE = """
class Late:
    differentiable = False
    calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return images[:, 0].mean((1, 2)) * (self.calls > 2)  # two micro-batches make an update
"""


def rate_of(run: Run) -> float:
    return float(run.lr_scheduler.base_lrs[0])


def test_the_first_update_changes_the_images_by_the_set_amount(workplace: Path, tmp_path: Path) -> None:
    values = VALUES | {"max_train_steps": 120}
    run = build(config_file(workplace, tmp_path / "run", gradient_accumulation_steps=1, **values))
    prompts = run.sampler.sample(7, SAMPLES)
    before = run.chain.sample(prompts, range(SAMPLES)).latents[0]
    take_update(run, 0)
    after = run.chain.sample(prompts, range(SAMPLES)).latents[0]
    changes = (after - before).flatten(1).pow(2).mean(1).sqrt() / before.flatten(1).std(1)
    aim = aimed_change(120 * run.samples_per_update)
    assert aim > 1.5 * CHANGE
    assert float(changes.log().mean().exp()) == pytest.approx(aim, rel=0.3)  # on other samples than its own
    assert run.lr_scheduler.get_last_lr() == [rate_of(run)]


def test_a_long_chain_draws_in_fewer_steps(workplace: Path, tmp_path: Path) -> None:
    """The images of all steps change as much; where the smallest stage would be left none, it draws in more."""
    values = VALUES | {"estimator": "refl", "max_train_steps": 120, "num_inference_steps": 16}
    run = build(config_file(workplace, tmp_path / "run", **values))
    prompts = run.sampler.sample(7, SAMPLES)
    before = run.chain.sample(prompts, range(SAMPLES)).latents[0]
    drawn = run.denoiser_evaluations
    take_update(run, 0)
    searched = run.denoiser_evaluations - drawn - run.samples_per_update * 17
    assert searched in {SAMPLES * tries * MOST_STEPS for tries in range(2, TRIES + 3)}
    after = run.chain.sample(prompts, range(SAMPLES)).latents[0]
    changes = (after - before).flatten(1).pow(2).mean(1).sqrt() / before.flatten(1).std(1)
    assert float(changes.log().mean().exp()) == pytest.approx(aimed_change(120 * run.samples_per_update), rel=0.3)
    stages = {"dcot_rules": True, "dcot_fractions": [0.48, 0.48, 0.04]}  # no step of ten for the last
    staged = build(config_file(workplace, tmp_path / "staged", **values, **stages))
    take_update(staged, 0)
    assert rate_of(staged) == pytest.approx(rate_of(run), rel=0.5)


def test_a_longer_run_takes_smaller_steps_whose_noise_adds_up_to_the_same() -> None:
    noise = [aimed_change(samples) * samples**0.5 for samples in (300, 1200, 4800)]
    assert noise == pytest.approx([noise[0]] * 3)
    assert aimed_change(1) == aimed_change(100) == pytest.approx(9 * aimed_change(20_000))
    assert aimed_change(20_000) == aimed_change(10**9)


def test_the_rate_makes_up_for_what_scales_the_adapter(workplace: Path, tmp_path: Path) -> None:
    rates = []
    for alpha in (4, 32):
        run = build(config_file(workplace, tmp_path / str(alpha), rank=4, lora_alpha=alpha, **VALUES))
        take_update(run, 0)
        rates.append(rate_of(run))
    assert rates[0] / rates[1] == pytest.approx(8, rel=0.3)  # each is found to within 15 %


FAINT = """
def faint(images, prompts):
    return 1e-7 * images[:, 0].mean((1, 2))

def plain(images, prompts):
    return images[:, 0].mean((1, 2))
"""


def test_a_faint_first_gradient_does_not_raise_it(workplace: Path, tmp_path: Path) -> None:
    """As of samples that are nearly perfect already: far below Adam's epsilon, which would shorten the step."""
    (tmp_path / "faint.py").write_text(FAINT)
    rates, steps = [], []
    for name in ("plain", "faint"):
        values = VALUES | {"reward_fn": f"{tmp_path / 'faint.py'}:{name}"}
        run = build(config_file(workplace, tmp_path / name, **values))
        start = [parameter.detach().clone() for parameter in run.chain.parameters]
        take_update(run, 0)
        rates.append(rate_of(run))
        steps.append(torch.cat([(p - q).flatten() for p, q in zip(run.chain.parameters, start, strict=True)]))
        assert [group["eps"] for group in run.optimizer.param_groups] == [run.config.optimizer.adam_epsilon]
    assert rates[1] == pytest.approx(rates[0], rel=0.1)
    assert float(torch.nn.functional.cosine_similarity(*steps, dim=0)) > 0.99


def test_a_schedule_starts_from_the_rate(workplace: Path, tmp_path: Path) -> None:
    """With a warm-up the first step is none, and its rate is known all the same."""
    values = VALUES | {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}
    run = build(config_file(workplace, tmp_path / "run", **values))
    start = [parameter.detach().clone() for parameter in run.chain.parameters]
    take_update(run, 0)
    assert all(torch.equal(parameter, before) for parameter, before in zip(run.chain.parameters, start, strict=True))
    assert rate_of(run) > 0
    factors = [run.lr_scheduler.get_last_lr()[0] / rate_of(run)]
    for step in (1, 2):
        take_update(run, step)
        factors.append(run.lr_scheduler.get_last_lr()[0] / rate_of(run))
    assert factors == pytest.approx([0.5, 1, 1])


def test_an_update_that_moves_nothing_leaves_the_rate_to_the_next(workplace: Path, tmp_path: Path) -> None:
    """Equal rewards have no advantages."""
    (tmp_path / "late.py").write_text(LATE)
    values = VALUES | {"estimator": "grpo", "reward_fn": f"{tmp_path / 'late.py'}:Late"}
    run = build(config_file(workplace, tmp_path / "run", **values))
    start = [parameter.detach().clone() for parameter in run.chain.parameters]
    take_update(run, 0)
    assert run.lr_scheduler.base_lrs == [0]
    assert all(torch.equal(parameter, before) for parameter, before in zip(run.chain.parameters, start, strict=True))
    take_update(run, 1)
    assert run.lr_scheduler.base_lrs[0] > 0
    assert not all(
        torch.equal(parameter, before) for parameter, before in zip(run.chain.parameters, start, strict=True)
    )


FALLING = """
class Falling:
    calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return images[:, 0].mean((1, 2)) - float(self.calls > 5)  # one is a trial; two micro-batches make an update
"""


def test_where_the_reward_falls_it_goes_back_and_the_card_says_so(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "BLOCK_UPDATES", 2)
    monkeypatch.setattr(optimizer, "BLOCK_PROMPTS", 4)
    (tmp_path / "falling.py").write_text(FALLING)
    values = VALUES | {"lr_scheduler": "constant", "checkpointing_steps": 1}
    config = config_file(workplace, tmp_path / "run", **values, reward_fn=f"{tmp_path / 'falling.py'}:Falling")
    run, progress = train_here(config)
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [rates[0]] * 4 and rate_of(run) == rates[0] / 2, "halved after the fourth update"
    first, second = (load_file(tmp_path / "run" / f"checkpoint-{step}" / WEIGHTS) for step in (1, 2))
    last = load_file(tmp_path / "run" / "checkpoint-4" / WEIGHTS)
    for name in last:
        torch.testing.assert_close(last[name], (first[name] + second[name]) / 2)
    finish(run, progress, before=None)
    assert "halved once where the reward fell" in " ".join((tmp_path / "run" / "README.md").read_text().split())
    again = build(config, "--resume_from_checkpoint", "checkpoint-3")
    resume(again)
    assert again.rollback is not None and again.rollback.state_dict()["best"]["last"] == 2


@pytest.mark.parametrize("estimator", ["auto", "ram", "grpo"])
def test_some_methods_go_back_from_a_given_rate_too_and_resumes_with_the_half(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    """`auto`, and losses that nothing holds; the other methods keep the rate that is given."""
    monkeypatch.setattr(optimizer, "BLOCK_UPDATES", 2)
    monkeypatch.setattr(optimizer, "BLOCK_PROMPTS", 2)
    (tmp_path / "falling.py").write_text(FALLING.replace("calls = 0", "calls, differentiable = 1, False"))  # no trial
    values = {"estimator": estimator, "learning_rate": 0.01, "max_train_steps": 6, "checkpointing_steps": 4}
    config = config_file(workplace, tmp_path / "run", **values, reward_fn=f"{tmp_path / 'falling.py'}:Falling")
    train_here(config)
    expected = 0.01 if estimator == "grpo" else 0.005
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [0.01] * 4 + [expected] * 2
    for rate, then in ((0.01, expected), (0.003, 0.003)):
        again = build(config, "--resume_from_checkpoint", "checkpoint-4", "--learning_rate", str(rate))
        resume(again)
        assert again.optimizer.param_groups[0]["lr"] == rate_of(again) == then
