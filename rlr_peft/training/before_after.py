"""The comparison of base and adapter that a run ends with, as a page and as one row per image."""

from torch import Tensor

from rlr_peft.compare.comparison import Comparison, MeasuredReward, Model
from rlr_peft.compare.distances import has_noise, measure_divergence, path_divergence
from rlr_peft.compare.evaluation import Evaluation, evaluation_plan
from rlr_peft.compare.labels import BASE, shown_name
from rlr_peft.compare.report import write_page_and_scores
from rlr_peft.compare.run import prompt_source
from rlr_peft.training.chain_building import build_chain
from rlr_peft.training.hardware import describe_hardware
from rlr_peft.training.run import Run
from rlr_peft.training.seeds import derive_seed
from rlr_peft.training.validation import evaluation_features, in_eval_mode

ADAPTER = "adapter"
# Samples for the KL from the base: each costs two images, so that it takes a quarter of the comparison at the most.
MOST_KL_IMAGES = 16
KL_SHARE = 4


def write_comparison(run: Run, before: Evaluation, after: Evaluation) -> Comparison:
    """Writes `compare.html`, `scores.parquet` and `scores.csv` into the run's folder; returns what they tell."""
    rewards = [MeasuredReward("reward", run.reward.name)]
    if run.heldout is not None:
        rewards.append(MeasuredReward("heldout", run.heldout.name, heldout=True))
    features = evaluation_features(run).name
    adapter = Model(ADAPTER, after, divergence_from_base(run))
    comparison = Comparison(rewards, Model(BASE, before), [adapter], _facts(run, before), features)
    write_page_and_scores(run.output_dir, comparison)
    return comparison


def divergence_from_base(run: Run) -> Tensor | None:
    """KL of the adapter's sampled paths from the base's in nats, (k,), at training's eta; the samples are those of
    `rlr-peft compare --kl_images k`.

    None where the chain has no noise, or there is nothing to sample.
    """
    if run.evaluation_prompts is None or not has_noise(run.chain):
        return None
    config = run.config
    count = max(2, min(MOST_KL_IMAGES, config.validation.num_evaluation_images // KL_SHARE))
    prompts, seeds = evaluation_plan(run.evaluation_prompts, count, derive_seed(config.training.seed, "divergence"))
    with in_eval_mode(run.chain):
        return measure_divergence(
            lambda texts, numbers: path_divergence(run.chain, texts, numbers),
            prompts,
            seeds,
            config.validation.evaluation_batch_size,
        )


def divergence_metrics(comparison: Comparison) -> dict[str, float]:
    """`kl`, its standard error `kl_se` and the samples `kl_n`, for `metrics.json`; empty where it was not measured."""
    (estimate,), (adapter,) = comparison.divergences, comparison.adapters
    if estimate is None or adapter.divergence is None:
        return {}
    return {"kl": estimate.value, "kl_se": estimate.error, "kl_n": len(adapter.divergence)}


def _facts(run: Run, before: Evaluation) -> dict[str, str]:
    config = run.config
    return {
        "base": shown_name(config.model.pretrained_model_name_or_path),
        "adapter": f"rank {config.lora.rank}, trained with {config.estimator.estimator}",
        "sampler": build_chain(config, run.pipeline, config.validation.evaluation_eta).sampling_in_words(),
        "prompts": f"{len(set(before.prompts))} of {len(run.evaluation_prompts or ())} {_source(run)}",
        "seed": str(config.training.seed),
        "hardware": describe_hardware(run.accelerator.device),
    }


def _source(run: Run) -> str:
    """Where the evaluation's prompts come from."""
    is_own_file = run.config.validation.evaluation_prompt_path is not None
    return f"{'in' if is_own_file else 'held back of'} {shown_name(prompt_source(run.config))}"
