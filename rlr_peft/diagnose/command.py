"""`rlr-peft diagnose`: how noisy is every gradient estimator on this pipeline and reward, and which one to take?"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlr_peft.build.reporting import refuse_missing_rewards, work_offline_without_hub
from rlr_peft.config import Config, ConfigError
from rlr_peft.config.arguments import knobs
from rlr_peft.config.knob import Group, knob
from rlr_peft.config.parsing import check_output, read_words
from rlr_peft.foreign_text import say, shown_name
from rlr_peft.rewards.names import refuse_unknown

if TYPE_CHECKING:
    from rlr_peft.build.run import Run
    from rlr_peft.estimators.objective import Batch

logger = logging.getLogger(__name__)

PROG = "rlr-peft diagnose"
DESCRIPTION = "Measure every gradient estimator on your pipeline, prompts and reward, and say which to use."


@dataclass(frozen=True)
class DiagnoseFlags(Group):
    """The diagnosis"""

    samples: int = knob(16, "Images to sample, rounded up to whole prompts.", unit="images", within="[4, 1e6]")
    output: str = knob(
        "outputs/diagnosis/report.html", "HTML file of the report; numbers and figure go beside it as .json and .png."
    )


def diagnose_command(words: Sequence[str]) -> int:
    """Builds the run as training does, measures, prints and writes the report; the weights are not trained."""
    said = read_words(words, DiagnoseFlags, PROG, DESCRIPTION, list(knobs()), example="--config tiny_shapes")
    samples, output, config = said.own.samples, Path(said.own.output), said.config()
    if output.suffix != ".html":
        raise ConfigError(f"output: expected a file that ends in .html, got {output}; rename it.")
    check_output(output, is_file=True)
    refuse_unknown(config.reward.specs)

    # Only now the network and the heavy imports: a wrong flag is refused at once.
    work_offline_without_hub()
    refuse_missing_rewards(config)

    from rlr_peft.build.run import build_run
    from rlr_peft.diagnose.diagnosis import diagnose
    from rlr_peft.diagnose.recommendation import recommend
    from rlr_peft.diagnose.report import console_text, write_report

    run = build_run(config)
    if run.accelerator.num_processes > 1:
        raise ConfigError(f"{PROG}: expected one process, got {run.accelerator.num_processes}; start it by itself.")
    # Samples are compared with others of their prompt, also where training itself needs no comparison.
    group_size = max(2, config.training.compared_images)
    num_groups = math.ceil(samples / group_size)
    logger.info("Sampling %d images", num_groups * group_size)
    started = time.perf_counter()
    batch = _sample(run, num_groups, group_size)
    sampling_seconds = (time.perf_counter() - started) / (num_groups * group_size)
    diagnosis = diagnose(
        run.chain,
        run.objective,
        batch.rollouts,
        config,
        group_size=group_size,
        sampling_seconds=sampling_seconds,
        facts=_facts(run, batch, num_groups, group_size),
    )
    recommendation = recommend(diagnosis)
    written = write_report(output, diagnosis, recommendation)
    say(console_text(diagnosis, recommendation))
    say(f"\nReport: {', '.join(map(str, written))}")
    return 0


def _sample(run: "Run", num_groups: int, group_size: int) -> "Batch":
    from rlr_peft.build.machine import derive_seed
    from rlr_peft.estimators.objective import sample_batch

    training = run.config.training
    prompts = [prompt for prompt in run.sampler.sample(0, num_groups) for _ in range(group_size)]
    return sample_batch(
        run.chain,
        run.objective,
        prompts,
        [derive_seed(training.seed, "calibration", 0, i) for i in range(len(prompts))],
        # Single samples are replayed, and dropout's masks depend on the size of the batch.
        1 if run.chain.denoiser.training else training.train_batch_size,
    )


def _facts(run: "Run", batch: "Batch", num_groups: int, group_size: int) -> dict[str, str]:
    """What is diagnosed, in words and without a path of this machine."""
    from rlr_peft.build.machine import describe_hardware

    config: Config = run.config
    name = config.model.pretrained_model_name_or_path
    rewards = batch.scored.scores
    return {
        "base": shown_name(name),
        "reward": f"{run.reward.name}, {float(rewards.mean()):.3g} on average, standard deviation "
        f"{float(rewards.std()):.2g} over the samples",
        "chain": f"T = {run.chain.num_steps} {config.chain.kind_of_steps} steps, eta {config.chain.eta:g}, guidance "
        f"{run.chain.guidance_scale:g}",
        "samples": f"{num_groups * group_size}, {group_size} for each of {num_groups} prompts",
        "trained": f"LoRA of rank {config.lora.rank}, {sum(p.numel() for p in run.chain.parameters):,} weights",
        "hardware": describe_hardware(run.accelerator.device),
    }
