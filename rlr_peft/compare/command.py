"""`rlr-peft compare`: what did the adapter change, and for better or worse?"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlr_peft.command_line import check_folder_or_exit, own_flags, own_parser
from rlr_peft.config import Config, ConfigError, config_from_dict
from rlr_peft.config.arguments import knobs
from rlr_peft.config.chain import SOURCES
from rlr_peft.config.found import read_found_config
from rlr_peft.config.parsing import exit_with, load_values
from rlr_peft.foreign_text import say

logger = logging.getLogger(__name__)

PROG = "rlr-peft compare"
DESCRIPTION = "The settings of the comparison, by the names of training."
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
)
TRAINING_ONLY = (
    *("gradient_checkpointing", "vae_gradient_checkpointing", "pretrained_tiny_vae_name_or_path", "torch_compile"),
    *("max_train_samples", "reward_scaling", "reward_minimum", "reward_minimum_penalty", "decode_batch_size"),
    "decoded_frames",
)


def compare_command(words: Sequence[str]) -> int:
    """Draws or finds what is there already, prints the tables and writes the report."""
    own, rest = _own_flags(words)
    config = _config_or_exit(own, rest)
    check_folder_or_exit("--output", own.output)

    from rlr_peft.build.reporting import set_up_logging

    set_up_logging()

    # Only now the heavy imports: a wrong flag is refused at once.
    from rlr_peft.build.folder_lock import only_writer
    from rlr_peft.build.reporting import reporting_errors
    from rlr_peft.compare.report import write_report
    from rlr_peft.compare.run import CompareOptions, compare_adapters
    from rlr_peft.compare.tables import console_text

    options = CompareOptions(
        adapters=own.adapter,
        output=own.output,
        images_per_prompt=own.images_per_prompt,
        kl_images=own.kl_images,
        features=own.features,
        hub_token=own.hub_token,
    )
    with reporting_errors("What is drawn is kept, and the same command goes on from there."), only_writer(own.output):
        comparison = compare_adapters(config, options)
        written = write_report(own.output, comparison)
    say(console_text(comparison))
    say(f"\nReport: {', '.join(map(str, written))}")
    return 0


def _own_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the words that are left for the config, long names in place of short ones."""
    own, rest = own_flags(
        _parser(),
        words,
        "Further settings by the names of training:",
        lambda: load_values(["--help"], PROG, _names(), DESCRIPTION),
    )
    if not own.adapter:
        exit_with(ConfigError("--adapter: expected one or more folders or Hub repositories, got none."))
    for name, low in (("images_per_prompt", 1), ("kl_images", 0)):
        value = getattr(own, name)
        if value < low:
            exit_with(ConfigError(f"--{name}: expected {low} or more, got {value}; raise it."))
    if own.output.exists() and not own.output.is_dir():
        exit_with(ConfigError(f"--output: expected a folder or a place for one, got the file {own.output}."))
    for alias, name in ALIASES.items():
        value = getattr(own, alias)
        if value is not None:
            rest += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return own, rest


def _parser() -> argparse.ArgumentParser:
    parser = own_parser(
        PROG,
        "--adapter FOLDER_OR_REPO [--adapter ...] [--output FOLDER] [--base NAME] [--prompts FILE] [--reward NAME] "
        "[--heldout NAME ...] [--config FILE] [--name VALUE ...]",
        "Draws the same prompts and seeds with the base and with every adapter, and says what changed. The plain "
        "settings of an adapter that was trained here are found beside it; --config and flags win over them.",
    )

    def flag(name: str, help_: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", help=help_, **options)

    flag(
        "adapter",
        "folder, .safetensors file or Hub repository (user/name, user/name@revision) of a LoRA adapter; give it again "
        "for another one",
        action="append",
        metavar="FOLDER_OR_REPO",
    )
    flag(
        "output",
        "folder of the report, the images and what is kept to go on after an interruption (default: %(default)s)",
        type=Path,
        default=Path("outputs/compare"),
        metavar="FOLDER",
    )
    flag("base", "Hub id or folder of the base, or tiny-shapes", metavar="NAME")
    flag("prompts", "prompts to draw, best such that were never trained on", metavar="FILE")
    flag("reward", "reward that the adapter was trained on", metavar="NAME")
    flag("heldout", "rewards that it was not trained on", nargs="+", metavar="NAME")
    flag("num_images", "images drawn by the base and by each adapter", metavar="N")
    flag(
        "images_per_prompt",
        "images of each prompt, which show the variety within a prompt; 1 draws what training's own evaluation draws "
        "(default: %(default)s)",
        type=int,
        default=4,
        metavar="N",
    )
    flag(
        "kl_images",
        "samples for the divergence from the base, 0 for none (default: %(default)s)",
        type=int,
        default=32,
        metavar="N",
    )
    flag(
        "features",
        "what variety is measured by: auto (the network of a reward that has one), thumbnails, or the Hub id or folder "
        "of a CLIP, ViT or DINOv2 model (default: %(default)s)",
        default="auto",
        metavar="NAME",
    )
    parser.add_argument(
        "--dcot",
        action=argparse.BooleanOptionalAction,
        help="draw with stage prompts (Diffusive Chain-of-Thought), by the built-in rules unless a --dcot_ setting "
        "says otherwise, or without; by default as the settings say",
    )
    flag("hub_token", "token for private repositories; by default that of `hf auth login` or HF_TOKEN", metavar="TOKEN")
    return parser


def _names() -> list[str]:
    return [
        name
        for name, knob in knobs().items()
        if (knob.group in GROUPS and name not in TRAINING_ONLY) or name in BESIDES
    ]


def _config_or_exit(own: argparse.Namespace, words: list[str]) -> Config:
    """The settings as a config of training, in which everything that only training needs stands at a default."""
    found = next(filter(None, map(_config_beside, own.adapter)), None)
    if any(word == "--config" or word.startswith("--config=") for word in words):
        found = None
    try:
        plain = {} if found is None else _plain_settings(found, words)
        values = load_values(words, PROG, _names(), DESCRIPTION, plain)
        source = values["prompt_path"] or values["dataset_name"]
        if source and values["evaluation_prompt_path"] is None and values["validation_split_percentage"] is None:
            say("Drawing training's own prompts: --prompts FILE names others, best such that it has never seen.")
        for alias, name in ALIASES.items():
            needed = alias in ("base", "reward") or (alias == "prompts" and not source)
            if values[name] is None and needed:
                file = f"--config {found}, if you trust it" if found is not None else f"--config with {name}"
                raise ConfigError(f"--{alias}: expected a value, got none; give it, or {file}.")
        values["prompt_path"] = values["prompt_path"] if source else values["evaluation_prompt_path"]
        _choose_stages(own.dcot, values)
        # An estimator without demands on the chain, since nothing is estimated.
        return config_from_dict({**values, "estimator": "full-bp", "output_dir": str(own.output)})
    except ConfigError as error:
        exit_with(error)


def _plain_settings(found: Path, words: list[str]) -> dict[str, Any]:
    """Of a config that nobody gave what cannot do harm: the folder may have been downloaded. Says what is left out."""
    flags = {word[2:].partition("=")[0] for word in words}
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
    """Stage prompts as the settings say, unless `--dcot` or `--no-dcot` does: the built-in rules, or none."""
    given = [name for name in SOURCES if values[name]]
    if wanted and not given:
        values["dcot_rules"] = True
    elif wanted is False:
        values.update({name: knob.field.default for name, knob in knobs().items() if knob.group == "chain_of_thought"})


def _config_beside(adapter: str) -> Path | None:
    """The config of the run that left this adapter, if it lies on this machine."""
    folder = Path(adapter).expanduser()
    folder = folder.parent if folder.is_file() else folder
    places = [folder / "config.yaml"]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)
