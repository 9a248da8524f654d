"""How far the first step moves the images, and the rate that `learning_rate: auto` takes for it.

    python -m benchmarks.first_step

On tiny-shapes, for several methods, rewards, ranks, alphas, guidance scales and chains: the relative change of the
clean latents when Adam's first step is taken at the rate 0.004, and the rate of `auto`. Two minutes on one core.
"""

import torch

from benchmarks.machine import write_results
from benchmarks.race import METHODS, REWARDS
from rlr_peft.build import build_run
from rlr_peft.config import load_config
from rlr_peft.training import calibrate, calibration_due, take_update
from rlr_peft.training.learning_rate import CHANGE, FIRST

# Method, reward and flags.
CASES: list[tuple[str, str, str]] = [
    ("refl", "coarse", ""),
    ("rlr", "coarse", ""),
    ("grpo", "coarse", ""),
    ("refl", "all", ""),
    ("refl", "coarse", "--train_batch_size 16 --max_train_steps 75"),
    ("refl", "coarse", "--rank 2"),
    ("refl", "coarse", "--rank 32"),
    ("refl", "coarse", "--lora_alpha 64"),
    ("refl", "coarse", "--guidance_scale 1"),
    ("refl", "coarse", "--num_inference_steps 50"),
    ("refl", "coarse", "--eta 0"),
    ("refl", "coarse", "--init_lora_weights kaiming"),
]


def main() -> None:
    """Measures every case and prints a table."""
    torch.set_num_threads(1)
    rows = [measure(*case) for case in CASES]
    print("| method | reward | flags | rate of `auto` | change at it | change at 0.004 |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['reward']} | {row['flags']} | {row['rate']:.2g} | {row['change']:.1%} | "
            f"{row['change_at_0.004']:.1%} |"
        )
    write_results("first_step", {"aim": CHANGE, "first_try": FIRST, "rows": rows})


def measure(method: str, reward: str, flags: str) -> dict[str, object]:
    """One case: two runs that differ in the rate alone."""
    rate, change = first_step(method, reward, flags, "auto")
    return {
        "method": method,
        "reward": reward,
        "flags": flags,
        "rate": rate,
        "change": change,
        "change_at_0.004": first_step(method, reward, flags, "0.004")[1],
    }


def first_step(method: str, reward: str, flags: str, learning_rate: str) -> tuple[float, float]:
    """The rate, and the change of the clean latents of other samples than those of the update."""
    own, group = METHODS[method]
    words = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none", "--heldout_reward_fn", "null", *own]
    words += [
        "--max_train_steps",
        "300",
        "--train_batch_size",
        "4",
        "--num_images_per_prompt",
        str(group),
        "--reward_fn",
        REWARDS[reward][0],
    ]
    words += ["--learning_rate", learning_rate, "--seed", "1"]
    # Later words would be refused beside the same flag: they take its place.
    for flag, value in zip(flags.split()[::2], flags.split()[1::2], strict=True):
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    run = build_run(load_config(words))
    if calibration_due(run, 0):
        calibrate(run, 0)
    prompts = run.sampler.sample(1000, 16)
    before = run.chain.sample(prompts, range(16)).latents[0]
    take_update(run, 0)
    after = run.chain.sample(prompts, range(16)).latents[0]
    changes = (after - before).flatten(1).pow(2).mean(1).sqrt() / before.flatten(1).std(1)
    return float(run.lr_scheduler.base_lrs[0]), float(changes.log().mean().exp())


if __name__ == "__main__":
    main()
