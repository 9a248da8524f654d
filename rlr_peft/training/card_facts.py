"""The facts of a run and the single images that its card is made of; the words are the template's."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import rlr_peft
from rlr_peft.build.chain import evaluation_chain, evaluation_in_words
from rlr_peft.build.machine import describe_hardware, package_versions
from rlr_peft.build.prompts import describe_chain_of_thought, source_shares
from rlr_peft.build.run import Run
from rlr_peft.chain.base_files import place_of_configs
from rlr_peft.config import config_to_dict, stages_from_config
from rlr_peft.config.model import DTYPE_NAMES, is_single_file
from rlr_peft.figures import save_image, save_video
from rlr_peft.foreign_text import shown_name
from rlr_peft.lora import adapted_denoisers, diffusers_loads
from rlr_peft.prompt import Prompt, PromptLike, as_prompt, texts_of
from rlr_peft.publishing.record import (
    SHOWN_PROMPTS,
    Adapter,
    Base,
    ImagePair,
    Images,
    Prompts,
    Rewards,
    RunRecord,
    Sampling,
    base_license,
    whole_place,
)
from rlr_peft.publishing.uploads import CARD_IMAGES
from rlr_peft.redaction import redacted_command
from rlr_peft.training.progress import LearningSignal, Progress
from rlr_peft.training.tracking import METRICS_LOG, read_metrics, stage_conditions


def run_record(
    run: Run, progress: Progress, metrics: Mapping[str, float], images: Images, compared_prompts: Sequence[Prompt] = ()
) -> RunRecord:
    """The record of a finished run.

    Args:
        metrics: the contents of `metrics.json`.
        compared_prompts: of the images of the comparison that are shown.
    """
    return RunRecord(
        base=_base(run),
        rewards=_rewards(run),
        config=config_to_dict(run.config),
        metrics=metrics,
        adapter=Adapter(denoisers=adapted_denoisers(run.pipeline), peft_config=_peft_config(run)),
        sampling=_sampling(run, compared_prompts),
        prompts=_prompts(run),
        images=images,
        training=_training(run, progress),
        machine=_machine(run),
    )


def logged_metrics(run: Run) -> list[dict[str, Any]]:
    """The updates' numbers; none if somebody has removed the file, by which a finished training must not be lost."""
    path = run.output_dir / METRICS_LOG
    return read_metrics(path) if path.is_file() else []


def _base(run: Run) -> Base:
    model = run.config.model
    name = model.pretrained_model_name_or_path
    return Base(
        model=whole_place(name),
        options=_given(
            revision=model.revision,
            variant=model.variant,
            config=whole_place(place_of_configs(model)) if is_single_file(name) else None,
        ),
        components=_given(
            vae=model.pretrained_vae_model_name_or_path, motion_adapter=model.pretrained_motion_adapter_name_or_path
        ),
        dtype=DTYPE_NAMES[model.mixed_precision],
        pipeline_tag=run.family.pipeline_tag,
        tags=run.family.tags,
        license=base_license(name, revision=model.revision, cache_dir=model.cache_dir),
        single_file_class=type(run.pipeline).__name__ if is_single_file(name) else None,
    )


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _peft_config(run: Run) -> dict[str, object] | None:
    """What `peft.LoraConfig` must be told where diffusers cannot load the adapter."""
    (name, *_) = adapted_denoisers(run.pipeline)
    denoiser = getattr(run.pipeline, name)
    if diffusers_loads(run.pipeline, denoiser):
        return None
    config = denoiser.peft_config["default"]
    arguments = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    return arguments | {option: True for option in ("use_dora", "use_rslora") if getattr(config, option)}


def _rewards(run: Run) -> Rewards:
    asked = run.config.reward.reward_fn
    weights = dict(zip(run.reward.part_names, [1.0] if isinstance(asked, str) else asked.values()))
    heldout = [] if run.heldout is None else run.heldout.part_names or [run.heldout.name]
    return Rewards(run.reward.name, weights, heldout)


def _sampling(run: Run, compared_prompts: Sequence[Prompt]) -> Sampling:
    chain = evaluation_chain(run.config, run.chain)
    scheduler = chain.inference_scheduler()
    shown = [*run.prompts[:SHOWN_PROMPTS], *compared_prompts]
    return Sampling(
        words=evaluation_in_words(run.config, run.chain),
        call={"num_inference_steps": chain.num_steps, **chain.call_arguments, **scheduler.call_options()},
        negative_prompts={prompt.text: text for prompt in shown if (text := prompt.negative_prompt) is not None},
        scheduler=scheduler.class_name,
        scheduler_options=dict(scheduler.options),
        scheduler_sigmas=() if scheduler.sigmas_in_call else scheduler.sigmas,
        difference=scheduler.difference,
        fps=run.chain.fps if run.chain.is_video else None,
    )


def _prompts(run: Run) -> Prompts:
    trained_on = set(texts_of(run.prompts))
    unseen = run.evaluation_prompts is not None and trained_on.isdisjoint(texts_of(run.evaluation_prompts))
    stages = stages_from_config(run.config)
    shares = source_shares(run.config)
    return Prompts(
        shown=texts_of(run.prompts[:SHOWN_PROMPTS]),
        count=None if run.config.prompts.streaming else len(run.prompts),
        evaluation="unseen prompts" if unseen else "the evaluation prompts",
        sources=[(shown_name(source), share) for source, share in shares.items()] if len(shares) > 1 else [],
        datasets=[name for name in run.config.prompts.datasets if not Path(name).expanduser().exists()],
        stages={} if stages is None else dict(zip(stages.names, stages.fractions, strict=True)),
        **_stage_prompts(run),
    )


def _stage_prompts(run: Run) -> dict[str, list[str]]:
    """An example of what conditions the stages, and of what guidance leads away from in them."""
    stages = stages_from_config(run.config)
    prompt = next((prompt for prompt in run.prompts if prompt.stages), None)
    if stages is None or prompt is None:
        return {}
    conditions, away_from = stage_conditions(run, stages, prompt)
    return {"stage_prompts": conditions, "away_from": away_from}


def _training(run: Run, progress: Progress) -> dict[str, Any]:
    # Where K is measured or drawn, the settings alone do not tell which the updates used (means of an update's).
    used = [row["first_order_steps"] for row in logged_metrics(run)]
    decoder = run.config.model.pretrained_tiny_vae_name_or_path
    return {
        "method": run.method,
        "objects": dict(run.given),
        "terms": run.estimator.describe(run.objective.has_gradient),
        "step_kind": "ode" if run.draws_without_noise else run.config.chain.kind_of_steps,
        "steps": run.chain.num_steps,
        "guidance_scale": run.chain.guidance_scale,
        "samples": run.samples_per_update,
        "images_per_prompt": run.num_images_per_prompt,
        "processes": run.accelerator.num_processes,
        "learning_rate": run.lr_scheduler.base_lrs[0],
        "schedule": run.config.optimizer.schedule,
        "learning_rate_halvings": 0 if run.rollback is None else run.rollback.halvings,
        "weights": sum(parameter.numel() for parameter in run.chain.parameters),
        "first_order": (min(used), max(used)) if any(used) else None,
        "chain_of_thought": describe_chain_of_thought(run.config, run.pipeline, run.prompts),
        "reward_decoder": decoder and (os.path.basename(decoder.rstrip("/")) if os.path.isdir(decoder) else decoder),
        "stopped_early": progress.stopped_early or None,
        "verdict": LearningSignal.of(run).verdict(logged_metrics(run)),
        "coverage": progress.coverage,
    }


def _machine(run: Run) -> dict[str, Any]:
    return {
        "command": shlex.join([*_program(), *redacted_command(sys.argv[1:])]),
        "hardware": describe_hardware(run.accelerator.device, run.accelerator.num_processes),
        "versions": package_versions(),
        "commit": _commit(),
    }


def _program() -> list[str]:
    """How this one is started, for people to start it again: not by the path of an installed file."""
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    spec = sys.modules["__main__"].__spec__
    if Path(sys.argv[0]).name == "rlr-peft":
        return ["rlr-peft"]
    return [*launcher, "-m", spec.name.removesuffix(".__main__")] if spec is not None else [*launcher, sys.argv[0]]


def _commit() -> str | None:
    """Of rlr-peft, where it runs from a checkout of its own; None where it was installed."""
    root = Path(rlr_peft.__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


IMAGES = "images"
MAX_GALLERY = 6
MAX_PAIRS = 4


def clear_card_images(output_dir: Path) -> None:
    """Removes those of an earlier run into the same folder."""
    for kind in CARD_IMAGES:
        for path in (output_dir / IMAGES).glob(f"{kind}_*"):
            path.unlink()


def save_gallery(output_dir: Path, images: Tensor, prompts: Sequence[str], fps: int | None) -> None:
    """Saves the first image or video of every prompt as `images/validation_I.*`.

    Args:
        images: (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1].
        prompts: N prompts, equal ones beside each other.
        fps: frames per second of videos.
    """
    for number, prompt in enumerate(list(dict.fromkeys(prompts))[:MAX_GALLERY]):
        image, path = images[prompts.index(prompt)], output_dir / IMAGES / f"validation_{number}"
        if image.ndim == 4:
            save_video(path, image, fps or 8)
        else:
            save_image(path.with_suffix(".png"), image)


def gallery(output_dir: Path, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """What `save_gallery` left: file name in the card's folder, and prompt."""
    found = []
    for number, prompt in enumerate(list(dict.fromkeys(map(str, prompts)))[:MAX_GALLERY]):
        found += [
            (f"{IMAGES}/{path.name}", str(prompt))
            for path in sorted((output_dir / IMAGES).glob(f"validation_{number}.*"))
        ]
    return found


def save_pairs(
    output_dir: Path,
    prompts: Sequence[PromptLike],
    images: tuple[Tensor, Tensor],
    scores: tuple[Tensor, Tensor],
    drawn: tuple[int, int] | None = None,
    image_area: int | None = None,
) -> list[ImagePair]:
    """Saves the first images of the comparison as `images/base_I.png` and `images/adapter_I.png`, and the pictures that
    they were drawn from, if there are any, as `images/condition_I.png`.

    Args:
        prompts: n of them.
        images: of base and adapter, each (k, 3, H, W) in [0, 1] of the first k <= n prompts.
        scores: of base and adapter, each (n,): the trained reward.
        drawn: width and height that were drawn, of videos those of a frame; None for those of the images.
        image_area: pixels of the pictures that they were drawn from, where these are more than what was drawn.
    """
    pairs = []
    for number, (prompt, *both) in enumerate(zip(prompts[:MAX_PAIRS], *images)):
        files = [f"{IMAGES}/{name}_{number}.png" for name in ("base", "adapter")]
        for file, image in zip(files, both, strict=True):
            save_image(output_dir / file, image)
        base, adapter = files
        condition, picture = None, as_prompt(prompt).image
        if picture is not None:
            condition = f"{IMAGES}/condition_{number}.png"
            width, height = drawn or (images[0].shape[-1], images[0].shape[-2])
            picture.fitted(width, height, image_area).save(output_dir / condition)
        before, after = (float(of_one[number]) for of_one in scores)
        pairs.append(ImagePair(str(prompt), base, adapter, before, after, condition))
    return pairs
