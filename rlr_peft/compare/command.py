"""`rlr-peft compare`: what did the adapter change, and for better or worse?"""

from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from rlr_peft.build.reporting import work_offline_without_hub
from rlr_peft.config import Config, ConfigError, HubArguments, config_from_dict
from rlr_peft.config.arguments import knobs
from rlr_peft.config.chain import SOURCES
from rlr_peft.config.files import config_beside, read_found_config
from rlr_peft.config.knob import Group, knob, preset
from rlr_peft.config.parsing import Words, check_output, read_words
from rlr_peft.errors import did_you_mean
from rlr_peft.foreign_text import say

PROG = "rlr-peft compare"
DESCRIPTION = (
    "Draw the same prompts and seeds with the base and with every adapter, and say what changed. The settings of an "
    "adapter that was trained here are found beside it; --config and flags win over them."
)
# Short words for flags of training.
ALIASES = {
    "base": "pretrained_model_name_or_path",
    "prompts": "evaluation_prompt_path",
    "reward": "reward_fn",
    "heldout": "heldout_reward_fn",
    "num_images": "num_evaluation_images",
}
# Of training's flags those that a comparison looks at: whole groups, less what only the training loop needs.
GROUPS = ("model", "chain", "prompts", "chain_of_thought", "reward")
BESIDES = (
    *("denoiser", "seed"),
    *("evaluation_prompt_path", "num_evaluation_images", "evaluation_batch_size", "evaluation_eta"),
    *("evaluation_steps", "evaluation_guidance_scale", "evaluation_resolution", "evaluation_scheduler"),
)
TRAINING_ONLY = (
    *("gradient_checkpointing", "vae_gradient_checkpointing", "pretrained_tiny_vae_name_or_path", "torch_compile"),
    "vae_tile_size",
    *("max_train_samples", "reward_scaling", "reward_minimum", "reward_minimum_penalty", "decode_batch_size"),
    "decoded_frames",
)


@dataclass(frozen=True)
class CompareFlags(Group):
    """The comparison"""

    adapter: tuple[str, ...] = knob(
        MISSING, "One or more LoRA adapters: folders, files or Hub repositories (user/name, user/name@revision)."
    )
    output: str = knob(
        "outputs/compare",
        "Folder of the report, the images and what is kept to go on after an interruption.",
    )
    base: str | None = knob(None, "Hub id or folder of the base, or tiny-shapes.")
    prompts: str | None = knob(None, "File of prompts to draw, best ones that were never trained on.")
    reward: dict[str, float] | str | None = knob(None, "Reward that the adapter was trained on.")
    heldout: tuple[str, ...] | None = knob(None, "Rewards that it was not trained on.")
    num_images: int | None = knob(
        None, "Images drawn by the base and by each adapter.", unit="images", within="[2, inf)"
    )
    images_per_prompt: int = knob(
        4,
        "Images of each prompt, which show the variety within a prompt; 1 draws what training's own evaluation draws.",
        unit="images",
        within="[1, 1e6]",
    )
    kl_images: int | None = knob(
        None,
        "Samples for the divergence from the base, 0 for none; null means as many as num_images, 32 at the most.",
        unit="images",
        within="[0, 1e6]",
    )
    features: str = knob(
        "auto",
        "What variety is measured by: auto (the network of a reward that has one), thumbnails, or the Hub id or folder "
        "of a CLIP, ViT or DINOv2 model.",
    )
    dcot: bool | None = knob(
        None,
        "Draw with stage prompts (Diffusive Chain-of-Thought), by the built-in rules unless a --dcot_ setting says "
        "otherwise, or without; null means as the settings say.",
    )
    hub_token: str | None = preset(HubArguments, "hub_token", None)


def compare_command(words: Sequence[str]) -> int:
    """Draws or finds what is there already, prints the tables and writes the report."""
    said = read_words(words, CompareFlags, PROG, DESCRIPTION, _names(), "adapter", example="outputs/aesthetic")
    own, output = said.own, Path(said.own.output)
    check_output(output)
    config = _config(said)

    # Only now the network and the heavy imports: a wrong flag is refused at once.
    work_offline_without_hub()

    from rlr_peft.build.folder_lock import only_writer
    from rlr_peft.build.reporting import reporting_errors
    from rlr_peft.compare.report import console_text, write_report
    from rlr_peft.compare.run import CompareOptions, compare_adapters

    options = CompareOptions(
        adapters=own.adapter,
        output=output,
        images_per_prompt=own.images_per_prompt,
        kl_images=own.kl_images,
        features=own.features,
        hub_token=own.hub_token,
    )
    with reporting_errors("What is drawn is kept, and the same command goes on from there."), only_writer(output):
        comparison = compare_adapters(config, options)
        written = write_report(output, comparison)
    say(console_text(comparison))
    say(f"\nReport: {', '.join(map(str, written))}")
    return 0


def _names() -> list[str]:
    return [
        name
        for name, knob in knobs().items()
        if (knob.group in GROUPS and name not in TRAINING_ONLY) or name in BESIDES
    ]


def _config(said: Words[CompareFlags]) -> Config:
    """The settings as a config of training, in which everything that only training needs stands at a default."""
    own, flags = said.own, dict(said.flags)
    for alias, name in ALIASES.items():
        value = getattr(own, alias)
        if value is not None and name in flags:
            raise ConfigError(f"{alias}: expected it or {name}, which means the same, got both; drop one.")
        if value is not None:
            flags[name] = value
    said = replace(said, flags=flags)
    found = None if said.file is not None else next(filter(None, map(config_beside, own.adapter)), None)
    plain = {} if found is None else _plain_settings(found, flags)
    values = {name: knobs()[name].default for name in said.names} | said.values(plain)
    source = values["prompt_path"] or values["dataset_name"]
    if source and values["evaluation_prompt_path"] is None and values["validation_split_percentage"] is None:
        say("Drawing training's own prompts: --prompts FILE names others, best ones that it has never seen.")
    for alias, name in ALIASES.items():
        needed = alias in ("base", "reward") or (alias == "prompts" and not source)
        if values[name] is None and needed:
            if found is None:
                _refuse_missing_files(own.adapter)
            file = f"--config {found}, if you trust it" if found is not None else f"--config with {name}"
            raise ConfigError(f"{alias}: expected a value, got none; give it, or {file}.")
    values["prompt_path"] = values["prompt_path"] if source else values["evaluation_prompt_path"]
    _choose_stages(own.dcot, values)
    # An estimator without demands on the chain, since nothing is estimated.
    return config_from_dict({**values, "estimator": "full-bp", "output_dir": own.output})


def _refuse_missing_files(adapters: Collection[str]) -> None:
    """Raises ConfigError for a mistyped path, beside which no settings can be found; `user/name` may be on the Hub."""
    for place in adapters:
        if place.partition("@")[0].count("/") != 1 and not Path(place).expanduser().exists():
            raise ConfigError(
                f"adapter: expected a folder, a .safetensors file or a Hub repository `user/name`, got {place}, which "
                f"does not exist (looked for it from {Path.cwd()}).{did_you_mean(place)}"
            )


def _plain_settings(found: Path, flags: Collection[str]) -> dict[str, Any]:
    """Of a config that nobody gave what cannot do harm: the folder may have been downloaded. Says what is left out."""
    plain, left_out = read_found_config(found, [name for name in _names() if name not in flags])
    if not any(name in plain for name in SOURCES):  # stages without prompts would be refused
        plain = {name: value for name, value in plain.items() if knobs()[name].group != "chain_of_thought"}
    sentence = f"Settings of {found}, where no flag says otherwise."
    if left_out:
        sentence += f" Left out, as a config that is found may name code, addresses and files: {', '.join(left_out)}; "
        sentence += f"if you trust it, give --config {found}."
    say(sentence)
    return plain


def _choose_stages(wanted: bool | None, values: dict[str, Any]) -> None:
    """Stage prompts as the settings say, unless `--dcot` or `--dcot false` does: the built-in rules, or none."""
    given = [name for name in SOURCES if values[name]]
    if wanted and not given:
        values["dcot_rules"] = True
    elif wanted is False:
        values.update({name: knob.field.default for name, knob in knobs().items() if knob.group == "chain_of_thought"})
