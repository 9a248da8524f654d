"""How much of a sample's gradient the other images of its prompt repeat, on tiny-shapes.

    python -m benchmarks.prompt_groups

Mean inner products of single samples' gradients at the base, over the samples' own square: with another image of the
prompt, and with one of another prompt. Where the first is near 1, a second image of a prompt tells next to nothing
new. 64 images of 16 prompts, five steps, the races' rewards. Writes ``benchmarks/results/prompt_groups.json``.
"""

import torch

from benchmarks.machine import write_results
from benchmarks.race import REWARDS
from rlr_peft.build import build_run, derive_seed
from rlr_peft.config import load_config
from rlr_peft.estimators import GradientSketch, measure_step_gradients, sample_batch

PROMPTS, IMAGES = 16, 4


def main() -> None:
    """Measures every reward, for the last step and for all."""
    rows = {}
    for reward in ("coarse", "fine", "all"):
        gradients = step_gradients(reward)
        for name, vectors in (("last step", gradients[0]), ("all steps", gradients.sum(0))):
            rows[f"{reward}, {name}"] = alike(vectors.double())
            print(f"{reward}, {name}", rows[f"{reward}, {name}"], flush=True)
    print(write_results("prompt_groups", {"prompts": PROMPTS, "images_per_prompt": IMAGES, "rows": rows}))


def step_gradients(reward: str) -> torch.Tensor:
    """Sketches of the samples' gradients through every step, (T, N, d)."""
    words = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none", "--estimator", "full-bp"]
    words += ["--num_inference_steps", "5", "--reward_fn", REWARDS[reward][0]]
    run = build_run(load_config([*words, "--heldout_reward_fn", REWARDS[reward][1]]))
    prompts = [prompt for prompt in run.sampler.sample(0, PROMPTS) for _ in range(IMAGES)]
    seeds = [derive_seed(0, "calibration", i) for i in range(len(prompts))]
    batch = sample_batch(run.chain, run.objective, prompts, seeds, 8)
    sketch = GradientSketch(run.chain.parameters)
    measured = measure_step_gradients(run.chain, batch.rollouts, batch.rewards, sketch, first_order_only=True).pathwise
    assert measured is not None  # as the rewards have a gradient
    return measured


def alike(vectors: torch.Tensor) -> dict[str, float]:
    """Mean inner products over the mean square, of vectors (N, d) with those of the same prompt and of others."""
    products, prompt = vectors @ vectors.T, torch.arange(len(vectors)) // IMAGES
    same = prompt[:, None] == prompt
    other = ~torch.eye(len(vectors), dtype=torch.bool)
    own = products.diagonal().mean()
    return {
        "same_prompt": round(float(products[same & other].mean() / own), 3),
        "other_prompt": round(float(products[~same].mean() / own), 3),
    }


if __name__ == "__main__":
    main()
