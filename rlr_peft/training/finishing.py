"""What a finished run leaves: the adapter, proven to reload; figures, numbers and the card."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rlr_peft.build.chain import (
    ImagesError,
    evaluation_chain,
    evaluation_in_words,
    in_eval_mode,
    render,
)
from rlr_peft.build.machine import derive_seed, describe_hardware
from rlr_peft.build.run import Run
from rlr_peft.chain.families import adapter_folder, adapter_loading
from rlr_peft.chain.steps import noisy_steps
from rlr_peft.compare.comparison import BASE, Comparison, MeasuredReward, Model
from rlr_peft.compare.distances import measure_divergence, path_divergence
from rlr_peft.compare.evaluation import Evaluation, flat_metrics, paired_gains, prompts_and_seeds
from rlr_peft.compare.report import PAGE, write_page_and_scores
from rlr_peft.compare.run import prompt_source
from rlr_peft.figures import CurvePoint, save_before_after, save_reward_curve
from rlr_peft.files import KOHYA_NAME, replacing_file
from rlr_peft.foreign_text import shown_name
from rlr_peft.lora import (
    adapted_denoisers,
    diffusers_loads,
    export_adapter,
    find_adapter,
    save_lora,
    verify_lora_reloads,
)
from rlr_peft.lora.proof import VERIFIED_IMAGES
from rlr_peft.prompt import texts_of
from rlr_peft.publishing.card import write_card
from rlr_peft.publishing.record import Images, StoredCard
from rlr_peft.reports import counted, gain_with_error
from rlr_peft.tiny_shapes import PIPELINE_NAME
from rlr_peft.training.card_facts import clear_card_images, gallery, logged_metrics, run_record, save_pairs
from rlr_peft.training.progress import LearningSignal, Progress, ProgressPage
from rlr_peft.training.validation import NUM_PAIRS, evaluate_adapter, evaluation_features, save_validation_images

logger = logging.getLogger(__name__)

BEFORE_AFTER = "before_after.png"
REWARD_CURVE = "reward_curve.png"
METRICS = "metrics.json"
ADAPTER = "adapter"
# Samples for the KL from the base: each costs two images, so that it takes a quarter of the comparison at the most.
MOST_KL_IMAGES = 16
KL_SHARE = 4


def finish(run: Run, progress: Progress, before: Evaluation | None) -> dict[str, float]:
    """Saves the adapter, measures it, draws figures, checks that it reloads, and writes numbers and card.

    Every process must call it, and draws its share of the images; the main one writes.

    Returns:
        The contents of ``metrics.json``, in every process.

    Raises:
        AdapterMismatchError: the saved adapter does not reproduce the trained one.
    """
    metrics: dict[str, float] = {}
    with run.averaged():
        if run.accelerator.is_main_process:
            _save_adapter(run)
        if not run.config.validation.skip_final_inference:
            save_validation_images(run, progress.step, "test")
        with _adapter_kept(run):
            after = evaluate_adapter(run)
        divergence = None if before is None or after is None else divergence_from_base(run)
        if run.accelerator.is_main_process:
            metrics = _report(run, progress, before, after, divergence)
    return run.processes.broadcast(metrics, "the result")


def _save_adapter(run: Run) -> None:
    save_lora(run.pipeline, run.output_dir)
    if run.config.lora.output_kohya_format:
        export_adapter(find_adapter(str(run.output_dir)), run.output_dir / KOHYA_NAME)
    clear_card_images(run.output_dir)


def _report(
    run: Run, progress: Progress, before: Evaluation | None, after: Evaluation | None, divergence: Tensor | None
) -> dict[str, float]:
    """Draws figures, checks that the adapter reloads, and writes numbers and card; the contents of ``metrics.json``."""
    metrics = {
        "steps": progress.step,
        "seconds": progress.seconds,
        "peak_memory_mb": progress.peak_memory_mb,
        "denoiser_evaluations": progress.denoiser_evaluations,
    }
    images, compared = Images(), []
    if before is not None and after is not None:
        comparison = write_comparison(run, before, after, divergence)
        metrics = flat_metrics(paired_gains(before, after)) | divergence_metrics(comparison) | metrics
        images, compared = _save_before_after(run, before, after), before.prompts[:NUM_PAIRS]
    images = replace(images, reward_curve=_save_curve(run), gallery=_gallery(run, images))
    with _adapter_kept(run):
        _verify_adapter(run)  # before the numbers and the card, by which others take the folder for finished
    with replacing_file(run.output_dir / METRICS) as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_card(run.output_dir, StoredCard(run_record(run, progress, metrics, images, compared)))
    ProgressPage(run, logged_metrics(run)).write(progress, "finished")
    return metrics


@contextmanager
def _adapter_kept(run: Run) -> Iterator[None]:
    """Where the images are not finite, the adapter is there all the same, and its user should know."""
    try:
        yield
    except ImagesError as error:
        raise ImagesError(
            f"{error} The trained adapter is saved in {run.output_dir}, without numbers and card; `rlr-peft compare` "
            "measures it, also in another --mixed_precision."
        ) from error


def _save_before_after(run: Run, before: Evaluation, after: Evaluation) -> Images:
    """The first images of the comparison: all in one figure, and some at full size."""
    prompts = texts_of(before.prompts[:NUM_PAIRS])
    images = (before.images, after.images)
    scores = (before.scores["reward"][:NUM_PAIRS], after.scores["reward"][:NUM_PAIRS])
    save_before_after(run.output_dir / BEFORE_AFTER, *images, prompts, *(of_one.tolist() for of_one in scores))
    shown = before.prompts[:NUM_PAIRS]
    pairs = save_pairs(run.output_dir, shown, images, scores, _drawn_size(run), run.family.image_area)
    return Images(before_after=BEFORE_AFTER, before_after_prompts=prompts, pairs=pairs)


def _drawn_size(run: Run) -> tuple[int, int] | None:
    """Width and height of what was compared, of videos those of a frame; None where the pipeline chose them."""
    call = evaluation_chain(run.config, run.chain).call_arguments
    return (call["width"], call["height"]) if {"width", "height"} <= call.keys() else None


def _gallery(run: Run, images: Images) -> list[tuple[str, str]]:
    """File name and prompt of what the adapter drew; of videos the pairs are strips of frames and no part of it."""
    pairs = [] if run.chain.is_video else [(pair.adapter, pair.prompt) for pair in images.pairs]
    return gallery(run.output_dir, run.config.validation.validation_prompt or ()) + pairs


def _save_curve(run: Run) -> str | None:
    """Draws the rewards of the updates; returns the file's name."""

    def points(name: str) -> list[CurvePoint]:
        return [
            CurvePoint(record["step"], record[name], record[f"{name}_se"], record["denoiser_evaluations"])
            for record in logged_metrics(run)
            if name in record  # a run may have got its held-out reward when it was resumed
        ]

    path, reward = run.output_dir / REWARD_CURVE, points("reward")
    path.unlink(missing_ok=True)
    if not reward:  # the run went on from the last step of a checkpoint without metrics beside it
        return None
    heldout = {} if run.heldout is None else {run.heldout.name: points("heldout")}
    save_reward_curve(path, reward, heldout, reward_name=run.reward.name)
    return REWARD_CURVE


def _verify_adapter(run: Run) -> None:
    prompts, seeds = prompts_and_seeds(
        run.prompts, VERIFIED_IMAGES, derive_seed(run.config.training.seed, "validation")
    )
    chain = evaluation_chain(run.config, run.chain)
    with torch.compiler.set_stance("force_eager"):  # what is loaded is not compiled, and rounds differently
        difference = verify_lora_reloads(run.pipeline, run.output_dir, lambda _: render(chain, prompts, seeds))
    exactly = "bit for bit" if difference == 0 else f"up to the machine's rounding ({difference:.1g} of 1)"
    logger.info("The saved adapter, loaded back by load_lora_weights, draws the same images %s.", exactly)


def write_comparison(run: Run, before: Evaluation, after: Evaluation, divergence: Tensor | None) -> Comparison:
    """Writes `compare.html`, `scores.parquet` and `scores.csv` into the run's folder; returns what they tell.

    ``divergence`` is the adapter's, from ``divergence_from_base``.
    """
    rewards = [MeasuredReward("reward", run.reward.name)]
    if run.heldout is not None:
        rewards.append(MeasuredReward("heldout", run.heldout.name, heldout=True))
    features = evaluation_features(run).name
    adapter = Model(ADAPTER, after, divergence)
    comparison = Comparison(rewards, Model(BASE, before), [adapter], _facts(run, before), features)
    write_page_and_scores(run.output_dir, comparison)
    return comparison


def divergence_from_base(run: Run) -> Tensor | None:
    """KL of the adapter's sampled paths from the base's in nats, (k,), at training's eta; the samples are those of
    `rlr-peft compare --kl_images k`.

    None where the chain has no noise, or there is nothing to sample. Every process must call it.
    """
    count, config = num_divergence_samples(run), run.config
    if run.evaluation_prompts is None or not count:
        return None
    prompts, seeds = prompts_and_seeds(run.evaluation_prompts, count, derive_seed(config.training.seed, "divergence"))
    chain = run.chain.at()  # noise in all steps that may have some, wherever the last update had it
    with in_eval_mode(chain):
        return measure_divergence(
            lambda texts, numbers: path_divergence(chain, texts, numbers),
            prompts,
            seeds,
            config.validation.evaluation_batch_size,
            processes=run.processes,
        )


def num_divergence_samples(run: Run) -> int:
    """Samples on which the divergence from the base is measured; 0 where the chain has no noise."""
    return max(2, min(MOST_KL_IMAGES, run.arithmetic.evaluation_images // KL_SHARE)) if noisy_steps(run.chain) else 0


def divergence_metrics(comparison: Comparison) -> dict[str, float]:
    """`kl`, its standard error `kl_se` and the samples `kl_n`, for `metrics.json`; empty where it was not measured."""
    (estimate,), (adapter,) = comparison.divergences, comparison.adapters
    if estimate is None or adapter.divergence is None:
        return {}
    return {"kl": estimate.value, "kl_se": estimate.error, "kl_n": len(adapter.divergence)}


def _facts(run: Run, before: Evaluation) -> dict[str, str]:
    config, unseen = run.config, texts_of(run.evaluation_prompts or ())
    return {
        "base": shown_name(config.model.pretrained_model_name_or_path),
        "adapter": f"rank {config.lora.rank}, trained with {run.method}",
        "sampler": evaluation_in_words(config, run.chain),
        "prompts": f"{len(set(texts_of(before.prompts)))} of {len(set(unseen))} {evaluation_source(run)}",
        "seed": str(config.training.seed),
        "hardware": describe_hardware(run.accelerator.device),
    }


def evaluation_source(run: Run) -> str:
    """Where the evaluation's prompts come from."""
    is_own_file = run.config.validation.evaluation_prompt_path is not None
    return f"{'in' if is_own_file else 'held back of'} {prompt_source(run.config)}"


def summary(run: Run, metrics: dict[str, float]) -> str:
    """The last lines that a run prints: what came out, and how to load it."""
    lines = [
        f"Trained {counted(round(metrics['steps']), 'step')} in {metrics['seconds']:.0f} s of training time.",
        *filter(None, [LearningSignal.of(run).verdict(logged_metrics(run))]),
    ]
    for name, reward in (("reward", run.reward), ("heldout", run.heldout)):
        if reward is not None and f"{name}_gain" in metrics:
            lines.append(f"  {name} ({reward.name}): {_gain_text(metrics, name)} (n = {metrics['n']:.0f} images)")
            parts = [
                key.removesuffix("_gain") for key in metrics if key.startswith(f"{name}/") and key.endswith("_gain")
            ]
            lines += [f"    {part.removeprefix(f'{name}/')}: {_gain_text(metrics, part)}" for part in parts]
    base = run.config.model.pretrained_model_name_or_path
    load_from = "rlr_peft.tiny_shapes.pipeline_path()" if base == PIPELINE_NAME else repr(base)
    lines += [
        f"  card, figures and numbers: {run.output_dir}/README.md",
        *([f"  images side by side: {run.output_dir}/{PAGE}"] if "reward_gain" in metrics else []),
        "Load the adapter with",
        f"  pipe = diffusers.DiffusionPipeline.from_pretrained({load_from})",
        *(f"  {line}" for line in _loading_lines(run)),
    ]
    return "\n".join(lines)


def _gain_text(metrics: dict[str, float], name: str) -> str:
    before, after, gain, error = (metrics[f"{name}_{key}"] for key in ("before", "after", "gain", "gain_se"))
    return f"{before:.4f} -> {after:.4f}, gain {gain_with_error(before, after, gain, error)}"


def _loading_lines(run: Run) -> list[str]:
    folder, lines = str(run.output_dir), []
    for name in adapted_denoisers(run.pipeline):
        if adapter_folder(name) or diffusers_loads(run.pipeline, getattr(run.pipeline, name)):
            place = "/".join(filter(None, (folder, adapter_folder(name))))
            options = "".join(f", {option}={value}" for option, value in adapter_loading(name).items())
            lines.append(f"pipe.load_lora_weights({place!r}{options})")
        else:
            lines.append(f"rlr_peft.lora.load_lora(pipe, {folder!r})")
    return lines
