"""Looks at the images: grids at fixed seeds while training, base against adapter at the end."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rlr_peft.build.chain import ImagesError, evaluation_chain, render_with_latents
from rlr_peft.build.machine import derive_seed
from rlr_peft.build.rewards import reward_settings
from rlr_peft.build.run import Run
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.compare.distances import AUTO, FeatureExtractor, find_features
from rlr_peft.compare.evaluation import Evaluation, evaluate, make_pictures, prompts_and_seeds
from rlr_peft.errors import RewardError
from rlr_peft.figures import as_images, save_image_grid, save_video
from rlr_peft.files import replacing_file
from rlr_peft.lora import adapter_disabled
from rlr_peft.prompt import Prompt, texts_of
from rlr_peft.reports import decimals_of_scores
from rlr_peft.rewards.base import Metadata, Reward, Scored, measure_images
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.training.card_facts import save_gallery
from rlr_peft.training.progress import VALIDATION
from rlr_peft.training.resuming import capture_random_states, restore_random_states
from rlr_peft.training.tracking import track_images

logger = logging.getLogger(__name__)

# Pairs of base and adapter images in the before/after figure.
NUM_PAIRS = 12


def save_validation_images(run: Run, step: int, phase: str) -> Path | None:
    """Draws every validation prompt at the same seeds as ever, into ``validation/`` and the trackers.

    Of videos the grid shows strips of frames, and every video is a file beside it. The captions have the reward, and
    that of the base's image of the same seed where that was drawn.

    Every process must call it, and draws its share; the main one writes.

    Args:
        phase: ``validation`` or ``test``, the images' name in the tracker.

    Returns:
        The grid's path; None in other processes, without validation prompts, or where the images are not finite, which
        is said: they are to be looked at, and training need not end for them.
    """
    arguments = run.config.validation
    if not run.validation_prompts:
        return None
    chain = evaluation_chain(run.config, run.chain)
    prompts = [prompt for prompt in run.validation_prompts for _ in range(arguments.num_validation_images)]
    drawn = _draw(run, chain, prompts)
    if not run.accelerator.is_main_process:
        return None
    broken = next((batch for batch in drawn if isinstance(batch, str)), None)
    if broken is not None:
        logger.error("No %s images after %d updates: %s", phase, step, broken)
        return None
    batches = [batch for batch in drawn if not isinstance(batch, str)]
    images = torch.cat([batch.images for batch in batches])
    if phase == "test":
        save_gallery(run.output_dir, images, texts_of(prompts), chain.fps)
    path = run.output_dir / VALIDATION / f"step-{step:06d}.png"
    single = path.with_suffix("")  # each alone, for the page of the run's progress
    single.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(make_pictures(images)):
        (single / f"{i:03d}.{picture.mime_type.removeprefix('image/')}").write_bytes(picture.data)
    if images.ndim == 5:
        for i, video in enumerate(images):
            save_video(single / f"{i:03d}", video, chain.fps)
        images = as_images(images)
    title = f"After {step:,} update{'s' if step > 1 else ''}" if step else "Base"
    captions = _captions(texts_of(prompts), [batch.scores for batch in batches], path)
    save_image_grid(path, images, captions, arguments.num_validation_images, title)
    for tracker in run.accelerator.trackers:
        track_images(tracker, phase, to_8_bit(images), step)
    return path


@dataclass(frozen=True)
class _Batch:
    """Validation images on the CPU, and their rewards on the scales that never move; None if they cannot be judged."""

    images: torch.Tensor
    scores: list[float] | None


def _draw(run: Run, chain: DenoisingChain, prompts: list[Prompt]) -> list[_Batch | str]:
    """All batches; a text says why one is not finite."""
    seeds = [derive_seed(run.config.training.seed, "validation", i) for i in range(len(prompts))]
    size, latest = run.config.validation.evaluation_batch_size, _Drawn(chain)
    reward = run.reward.on_first_scales()
    unjudged: list[RewardError] = []

    def draw(start: int) -> _Batch | str:
        part, scores = prompts[start : start + size], None
        try:
            images = latest.images(part, seeds[start : start + size])
        except ImagesError as error:
            return str(error)
        try:
            seen = latest.latents.float() if reward.takes_latents else images
            scores = None if unjudged else measure_images(reward, seen, part).scores.tolist()
        except RewardError as error:  # such as prompts without the metadata of the training prompts
            logger.warning("The validation images have no scores: %s", error)
            unjudged.append(error)
        bar.update(min(run.processes.count * len(part), len(prompts) - bar.n))
        return _Batch(images.cpu(), scores)

    with tqdm(total=len(prompts), desc="Validation images", unit="image", leave=False) as bar:
        return run.processes.map(draw, range(0, len(prompts), size), "the validation images")


def _captions(texts: list[str], scores: list[list[float] | None], path: Path) -> list[str]:
    """The prompts with their scores, which are kept beside the images; "score (base's score)"."""
    values: list[float] = []
    for part in scores:
        if part is None:
            return texts
        values += part
    own, base = path.with_suffix(".json"), path.with_name("step-000000.json")
    with replacing_file(own) as aside:
        aside.write_text(json.dumps({"scores": values}) + "\n")
    before = json.loads(base.read_text())["scores"] if base != own and base.exists() else []
    shown = decimals_of_scores([*values, *before])
    now = [f"{text}: {score:.{shown}f}" for text, score in zip(texts, values, strict=True)]
    if len(before) != len(now):  # nothing was drawn before training, or a resumed run has other prompts
        return now
    return [f"{text} (base {score:.{shown}f})" for text, score in zip(now, before, strict=True)]


def evaluate_base(run: Run) -> Evaluation | None:
    """Scores the base, which is the pipeline with its adapter off; None without evaluation prompts.

    Every process must call it, draws its share, and gets the whole.

    Done before training: prompts that a reward cannot judge show then, not after hours. It leaves the global random
    generators as they are, where `resume` may have put them.
    """
    if run.evaluation_prompts is None:
        return None
    arithmetic = run.arithmetic
    logger.info(
        "Evaluating the base on %d images, %.0f %% as many as training draws; the adapter follows at the end.",
        arithmetic.evaluation_images,
        100 * arithmetic.evaluation_share,
    )
    states = capture_random_states(run.accelerator.device)
    with adapter_disabled(run.chain.denoiser), run.processes.doing("evaluating the base"):
        evaluation = _evaluate(run, run.evaluation_prompts, "Evaluating the base")
    restore_random_states(states, run.accelerator.device)
    return evaluation


def evaluate_adapter(run: Run, num_images: int | None = None) -> Evaluation | None:
    """Scores the adapter on the prompts and seeds of ``evaluate_base``; None without evaluation prompts.

    Every process must call it, draws its share, and gets the whole.

    Args:
        num_images: None for as many as the base has.
    """
    if run.evaluation_prompts is None:
        return None
    return _evaluate(run, run.evaluation_prompts, "Evaluating the adapter", num_images)


def evaluation_features(run: Run) -> FeatureExtractor:
    """What the variety of images is measured by; nothing is downloaded for it."""
    rewards = [reward for reward in (run.reward, run.heldout) if reward is not None]
    settings = reward_settings(run.config, run.accelerator.device).model
    return find_features(AUTO, run.config.model.pretrained_model_name_or_path, rewards, settings)


def _evaluate(
    run: Run, evaluation_prompts: list[Prompt], description: str, num_images: int | None = None
) -> Evaluation:
    arguments = run.config.validation
    seed = derive_seed(run.config.training.seed, "evaluation")
    prompts, seeds = prompts_and_seeds(evaluation_prompts, num_images or run.arithmetic.evaluation_images, seed)
    chain = evaluation_chain(run.config, run.chain)
    # What is compared before and after must not be measured on scales that move in between.
    drawn = _Drawn(chain)
    reward = run.reward.on_first_scales()
    rewards = {"reward": _OfLatents(reward, drawn) if reward.takes_latents else reward}
    rewards |= {} if run.heldout is None else {"heldout": run.heldout}
    return evaluate(
        drawn.images,
        prompts,
        seeds,
        rewards,
        arguments.evaluation_batch_size,
        num_kept_images=NUM_PAIRS,
        features=evaluation_features(run),
        description=description,
        processes=run.processes,
    )


class _Drawn:
    """Draws images, and keeps the latents of the latest ones."""

    def __init__(self, chain: DenoisingChain) -> None:
        self._chain = chain
        self.latents = torch.empty(0)

    def images(self, prompts: list[Prompt], seeds: list[int]) -> torch.Tensor:
        images, self.latents = render_with_latents(self._chain, prompts, seeds)
        return images


class _OfLatents(Reward):
    """Scores, in place of images, the latents that they were decoded from."""

    def __init__(self, reward: Reward, drawn: _Drawn) -> None:
        self.name, self._reward, self._drawn = reward.name, reward, drawn
        self.takes_video = self.takes_images = True  # it looks at neither

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        return measure_images(self._reward, self._drawn.latents.float(), prompts, metadata)
