import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlr_peft.build import build_lr_scheduler, build_optimizer, restore_optimizer
from rlr_peft.config import LrScheduler, OptimizerArguments


def new_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # 64 x 64 = 4096 elements: the smallest tensor whose state bitsandbytes keeps in 8 bits
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 64), (8, 4))]


def gradients(parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(parameter.shape, generator=generator) for parameter in parameters]


def take_steps(
    parameters: list[nn.Parameter], optimizer: Optimizer, scheduler: LRScheduler, first: int, last: int
) -> None:
    for step in range(first, last):
        for parameter, gradient in zip(parameters, gradients(parameters, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_one_step_follows_the_formula_of_adamw() -> None:
    arguments = OptimizerArguments(
        learning_rate=0.01, adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.1, adam_epsilon=1e-3
    )
    parameters = new_parameters()
    before, gradient = parameters[0].detach().clone(), gradients(parameters, 0)[0]
    optimizer = build_optimizer(parameters, arguments)
    take_steps(parameters, optimizer, build_lr_scheduler(optimizer, arguments, 10), 0, 1)
    # after one step the corrected mean is g and the corrected mean square is g^2
    expected = before * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(parameters[0].detach(), expected)


def test_the_8_bit_step_is_near_the_full_one_and_its_state_is_in_8_bits() -> None:
    results = []
    for use_8bit_adam in (False, True):
        arguments = OptimizerArguments(learning_rate=0.01, use_8bit_adam=use_8bit_adam)
        parameters = new_parameters()
        optimizer = build_optimizer(parameters, arguments)
        take_steps(parameters, optimizer, build_lr_scheduler(optimizer, arguments, 10), 0, 3)
        results.append([parameter.detach() for parameter in parameters])
        if use_8bit_adam:
            assert optimizer.state[parameters[0]]["state1"].dtype == torch.uint8
            assert optimizer.state[parameters[1]]["state1"].dtype == torch.float32
    moved = (results[0][0] - new_parameters()[0].detach()).abs().mean()
    assert (results[0][0] - results[1][0]).abs().mean() < 0.05 * moved
    torch.testing.assert_close(results[0][1], results[1][1])


def test_weights_at_zero_move_by_the_rate_with_adafactor() -> None:
    arguments = OptimizerArguments(optimizer="Adafactor", learning_rate=0.01, adam_weight_decay=0.0)
    weight = nn.Parameter(torch.zeros(64, 8))
    optimizer = build_optimizer([weight], arguments)
    take_steps([weight], optimizer, build_lr_scheduler(optimizer, arguments, 10), 0, 1)
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.01, rel=0.1)


def test_one_step_of_lion_is_the_sign_and_one_of_muon_is_orthogonal() -> None:
    """https://arxiv.org/abs/2302.06675; https://arxiv.org/abs/2502.16982, whose root mean square is that of AdamW."""
    for name in ("Lion", "Muon"):
        arguments = OptimizerArguments(optimizer=name, learning_rate=0.01, adam_weight_decay=0.1)
        parameters = new_parameters()
        before, gradient = parameters[0].detach().clone(), gradients(parameters, 0)[0]
        optimizer = build_optimizer(parameters, arguments)
        take_steps(parameters, optimizer, build_lr_scheduler(optimizer, arguments, 10), 0, 1)
        step = (before * (1 - 0.01 * 0.1) - parameters[0].detach()) / 0.01
        if name == "Lion":
            torch.testing.assert_close(step, gradient.sign(), rtol=0, atol=1e-3)
        else:
            values = torch.linalg.svdvals(step) / (0.2 * 64**0.5)
            assert values.min() > 0.3 and values.max() < 1.3, "the gradient's differ by a factor of about 100"


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Adafactor", "Lion", "Muon", "Prodigy"])
def test_a_resumed_optimizer_repeats_the_uninterrupted_one_bit_for_bit(name: str) -> None:
    if name == "Prodigy":
        pytest.importorskip("prodigyopt", reason="an extra")
    arguments = OptimizerArguments(
        optimizer=name.removesuffix("8bit"),
        use_8bit_adam=name.endswith("8bit"),
        learning_rate=1 if name == "Prodigy" else 0.01,
        lr_scheduler="cosine",
        lr_warmup_steps=2,
    )
    whole = new_parameters()
    optimizer = build_optimizer(whole, arguments)
    scheduler = build_lr_scheduler(optimizer, arguments, 8)
    take_steps(whole, optimizer, scheduler, 0, 4)
    assert all(not torch.equal(one, start) for one, start in zip(whole, new_parameters(), strict=True))
    saved = through_a_file(
        {
            "parameters": [parameter.detach() for parameter in whole],
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
    )
    take_steps(whole, optimizer, scheduler, 4, 8)

    resumed = new_parameters()
    for parameter, value in zip(resumed, saved["parameters"], strict=True):
        parameter.data.copy_(value)
    optimizer = build_optimizer(resumed, arguments)
    scheduler = build_lr_scheduler(optimizer, arguments, 8)
    restore_optimizer(optimizer, scheduler, saved["optimizer"], saved["scheduler"])
    take_steps(resumed, optimizer, scheduler, 4, 8)
    for left, right in zip(whole, resumed, strict=True):
        assert torch.equal(left, right)


def test_a_resumed_optimizer_takes_the_settings_that_the_config_asks_for_now() -> None:
    """The checkpoint's own would stay in force otherwise, while config and card name the new ones."""
    before = OptimizerArguments(learning_rate=0.01, lr_scheduler="linear", adam_weight_decay=0.1)
    after = OptimizerArguments(learning_rate=0.5, lr_scheduler="linear", adam_weight_decay=0.2, adam_beta1=0.5)
    parameters = new_parameters()
    optimizer = build_optimizer(parameters, before)
    scheduler = build_lr_scheduler(optimizer, before, 8)
    take_steps(parameters, optimizer, scheduler, 0, 4)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})

    optimizer = build_optimizer(parameters, after)
    scheduler = build_lr_scheduler(optimizer, after, 8)
    restore_optimizer(optimizer, scheduler, saved["optimizer"], saved["scheduler"])
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(0.25) == scheduler.get_last_lr()[0], "halfway down from the new rate"
    assert group["weight_decay"] == 0.2 and group["betas"] == (0.5, 0.999)
    assert float(optimizer.state[parameters[0]]["step"]) == 4, "the moments are the checkpoint's"
    take_steps(parameters, optimizer, scheduler, 4, 5)
    assert group["lr"] == pytest.approx(0.5 * 3 / 8)


@pytest.mark.parametrize("first", [0.5, 0.01])
def test_a_rate_that_was_halved_stays_so_while_the_config_asks_for_the_same(first: float) -> None:
    """Whatever the first session of the run was asked for."""
    parameters, saved = new_parameters(), {}
    for asked in (first, 0.5, 0.5):
        arguments = OptimizerArguments(learning_rate=asked)
        optimizer = build_optimizer(parameters, arguments)
        scheduler = build_lr_scheduler(optimizer, arguments, 8)
        if saved:
            restore_optimizer(optimizer, scheduler, saved["optimizer"], saved["scheduler"])
        rate = scheduler.base_lrs[0]
        scheduler.base_lrs = [asked / 4]  # halved twice since
        take_steps(parameters, optimizer, scheduler, 0, 1)
        saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    assert rate == 0.5 / 4


def learning_rates(arguments: OptimizerArguments, steps: int, samples_per_step: int = 1) -> list[float]:
    parameters = new_parameters()
    optimizer = build_optimizer(parameters, arguments, samples_per_step=samples_per_step)
    scheduler = build_lr_scheduler(optimizer, arguments, steps)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        take_steps(parameters, optimizer, scheduler, step, step + 1)
    return rates


def test_schedules_count_optimizer_steps() -> None:
    linear = OptimizerArguments(learning_rate=1.0, lr_scheduler="linear", lr_warmup_steps=2)
    assert learning_rates(linear, 6) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert learning_rates(OptimizerArguments(learning_rate=0.3), 3) == [0.3, 0.3, 0.3]
    polynomial = OptimizerArguments(learning_rate=1.0, lr_scheduler="polynomial", lr_power=2.0)
    assert learning_rates(polynomial, 2) == pytest.approx([1, 0.25], abs=1e-6)


def test_a_measured_rate_stays_for_half_of_the_run_and_falls_to_0() -> None:
    def courses(scheduler: LrScheduler, steps: int, warmup: int = 0) -> list[float]:
        return learning_rates(
            OptimizerArguments(learning_rate=1.0, lr_scheduler=scheduler, lr_warmup_steps=warmup), steps
        )

    assert OptimizerArguments(learning_rate="auto").schedule == "warmup_stable_decay"
    assert OptimizerArguments(learning_rate="auto", lr_scheduler="cosine").schedule == "cosine"
    assert OptimizerArguments(learning_rate=1.0).schedule == "constant"
    assert courses("warmup_stable_decay", 7) == pytest.approx([1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert courses("warmup_stable_decay", 8, 2) == pytest.approx([0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25])
    assert courses("warmup_stable_decay", 4, 3) == pytest.approx([0, 1 / 3, 2 / 3, 1]), "no time but to rise"
    assert courses("warmup_stable_decay", 1) == [1]


def test_scale_lr_multiplies_by_the_samples_of_an_update() -> None:
    assert learning_rates(OptimizerArguments(learning_rate=0.5, scale_lr=True), 1, samples_per_step=8) == [4.0]
    assert learning_rates(OptimizerArguments(learning_rate=0.5), 1, samples_per_step=8) == [0.5]
