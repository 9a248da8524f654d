"""The comparison of base and adapter that a run ends with, as a page and as one row per image."""

from pathlib import Path

from rlr_peft.evaluation.compare import Evaluation
from rlr_peft.evaluation.comparison.comparison import Comparison, MeasuredReward, Model
from rlr_peft.evaluation.comparison.labels import BASE, shown_name
from rlr_peft.evaluation.comparison.report import write_page_and_scores
from rlr_peft.training.comparison_setup import prompt_source
from rlr_peft.training.hardware import describe_hardware
from rlr_peft.training.run import Run
from rlr_peft.training.validation import evaluation_features

ADAPTER = "adapter"


def write_comparison(run: Run, before: Evaluation, after: Evaluation) -> list[Path]:
    """Writes `compare.html`, `scores.parquet` and `scores.csv` into the run's folder; returns their paths."""
    rewards = [MeasuredReward("reward", run.reward.name)]
    if run.heldout is not None:
        rewards.append(MeasuredReward("heldout", run.heldout.name, heldout=True))
    features = evaluation_features(run).name
    comparison = Comparison(rewards, Model(BASE, before), [Model(ADAPTER, after)], _facts(run, before), features)
    return write_page_and_scores(run.output_dir, comparison)


def _facts(run: Run, before: Evaluation) -> dict[str, str]:
    config, validation = run.config, run.config.validation
    return {
        "base": shown_name(config.model.pretrained_model_name_or_path),
        "adapter": f"rank {config.lora.rank}, trained with {config.estimator.estimator}",
        "sampler": f"{run.chain.num_steps} {run.chain.solver} steps, eta {validation.evaluation_eta:g}, guidance "
        f"{run.chain.guidance_scale:g}",
        "prompts": f"{len(set(before.prompts))} of {shown_name(prompt_source(config))}",
        "seed": str(config.training.seed),
        "hardware": describe_hardware(run.accelerator.device),
    }
