"""What a card says of a run beyond its numbers: settings, what chose the weights, licence, single images."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import rlr_peft
from rlr_peft.build.pipeline import DTYPES
from rlr_peft.compare.evaluation import Evaluation
from rlr_peft.config import config_to_dict, stages_from_config
from rlr_peft.prompt import texts_of
from rlr_peft.publishing.card_images import gallery, save_pairs
from rlr_peft.publishing.licenses import base_license
from rlr_peft.publishing.record import SHOWN_PROMPTS, RunRecord
from rlr_peft.publishing.snippet import base_kind
from rlr_peft.rewards.combination import HeldoutRewards, WeightedRewards
from rlr_peft.training.progress import Progress
from rlr_peft.training.run import Run
from rlr_peft.training.validation import NUM_PAIRS


def with_card_facts(
    record: RunRecord, run: Run, progress: Progress, before: Evaluation | None, after: Evaluation | None
) -> RunRecord:
    """The record with everything that the card adds; saves the single images it names.

    Args:
        record: the run's numbers and texts.
        run: the finished run.
        progress: how far it came.
        before, after: the comparison of base and adapter; None without evaluation prompts.
    """
    config = run.config
    base = config.model.pretrained_model_name_or_path
    licence = base_license(base, revision=config.model.revision, cache_dir=config.model.cache_dir)
    pairs = (
        []
        if before is None or after is None
        else save_pairs(
            run.output_dir,
            texts_of(before.prompts),
            (before.images, after.images),
            (before.scores["reward"], after.scores["reward"]),
        )
    )
    shown = gallery(run.output_dir, config.validation.validation_prompt or ())
    if not run.chain.is_video:  # of videos the pairs are strips of frames
        shown += [(pair.adapter, pair.prompt) for pair in pairs]
    dataset = config_to_dict(config).get("dataset_name")
    return replace(
        record,
        **_drawing(run, before),
        base_model=str(Path(base).expanduser().resolve()) if base_kind(base) == "folder" else base,
        base_options=_given(revision=config.model.revision, variant=config.model.variant),
        components=_given(
            vae=config.model.pretrained_vae_model_name_or_path,
            motion_adapter=config.model.pretrained_motion_adapter_name_or_path,
        ),
        reward_weights=_weights(run),
        heldout_names=run.heldout.names if isinstance(run.heldout, HeldoutRewards) else [],
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        datasets=[dataset] if dataset and not Path(dataset).exists() else [],
        selection=_selection(run, progress),
        settings=_settings(run),
        commit=_commit(),
        images=shown,
        pairs=pairs,
    )


def _drawing(run: Run, before: Evaluation | None) -> dict[str, Any]:
    """How the images that were measured came about, and how a pipeline alone draws them."""
    config = run.config
    chain = run.chain.at(eta=config.validation.evaluation_eta, whole=True)
    scheduler = chain.inference_scheduler()
    notes = [] if scheduler.difference is None else [scheduler.difference]
    if stages_from_config(config) is not None:
        notes.append("The numbers were measured with a prompt for every stage; how to draw so is said below.")
    if config.model.mixed_precision != "no":
        notes.append(
            f"In {DTYPES[config.model.mixed_precision]} it rounds its latents at every step, which were float32 where "
            "the numbers were measured: images differ in detail.".replace("torch.", "")
        )
    if config.model.bnb_quantization_config_path is not None:
        notes.append(
            "The numbers were measured on a base that bitsandbytes held in few bits, as the configuration says; here "
            "it is loaded in full."
        )
    shown = [*run.prompts[:SHOWN_PROMPTS], *([] if before is None else before.prompts[:NUM_PAIRS])]
    return {
        "evaluation": f"Drawn with {chain.sampling_in_words()}.",
        "inference": {
            "num_inference_steps": chain.num_steps,
            **chain.call_arguments,
            **scheduler.call_options(),
        },
        "scheduler": scheduler.class_name,
        "scheduler_options": dict(scheduler.options),
        "scheduler_sigmas": () if scheduler.sigmas_in_call else scheduler.sigmas,
        "snippet_notes": notes,
        "negative_prompts": {prompt.text: text for prompt in shown if (text := prompt.negative_prompt) is not None},
    }


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _commit() -> str | None:
    """Of rlr-peft, where it runs from a checkout of its own; None where it was installed."""
    root = Path(rlr_peft.__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _weights(run: Run) -> dict[str, float]:
    if not isinstance(run.reward, WeightedRewards):
        return {}
    asked = run.config.reward.reward_fn
    weights = [1.0] if isinstance(asked, str) else list(asked.values())
    return dict(zip(run.reward.scales(), weights, strict=True))


def _selection(run: Run, progress: Progress) -> list[str]:
    regularization = run.config.regularization
    watched = {
        "the held-out reward": regularization.early_stopping_steps is not None,
        "the divergence from the base": regularization.kl_limit is not None,
    }
    watching = " and ".join(name for name, is_watched in watched.items() if is_watched)
    if progress.stopped_early:
        sentence = (
            f"Early stopping on {watching}, measured on training prompts, ended the run and so chose these weights; "
            "the numbers here were measured once, afterwards."
        )
    elif watching:
        sentence = (
            f"Early stopping watched {watching} on training prompts and did not step in; the numbers here were "
            "measured once, at the end."
        )
    else:
        sentence = "Training ended after as many updates as it was set to; the numbers were measured once, then."
    return [sentence, "Whether the recipe was tuned on such numbers before this run is not recorded."]


def _settings(run: Run) -> dict[str, str]:
    config, arithmetic = run.config, run.arithmetic
    lora, optimizer, training = config.lora, config.optimizer, config.training
    alpha = lora.rank if lora.lora_alpha is None else lora.lora_alpha
    kind = "DoRA" if lora.use_dora else "LoRA"
    weights = sum(parameter.numel() for parameter in run.chain.parameters)
    groups = arithmetic.samples_per_update // training.num_images_per_prompt
    processes = run.accelerator.num_processes
    regularization = config.regularization
    settings = {
        "adapter": f"{kind} of rank {lora.rank}, alpha {alpha:g}{' (rsLoRA)' if lora.use_rslora else ''}, "
        f"{weights:,} weights in the {' and the '.join(run.family.denoisers)}",
        "update": f"{arithmetic.samples_per_update} samples ({groups} prompts x {training.num_images_per_prompt})"
        f"{f' on {processes} processes' if processes > 1 else ''}",
        "optimiser": f"{optimizer.optimizer}{' in 8 bits' if optimizer.use_8bit_adam else ''}, learning rate "
        f"{run.lr_scheduler.base_lrs[0]:g} ({optimizer.lr_scheduler}), "
        f"gradients clipped to norm {training.max_grad_norm:g}",
        "base weights": {"no": "fp32"}.get(config.model.mixed_precision, config.model.mixed_precision),
        "seed": str(training.seed),
    }
    if regularization.kl_beta:
        settings["penalty"] = f"{regularization.kl_beta:g} per nat of divergence from the base"
    return settings
