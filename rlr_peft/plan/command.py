"""`rlr-peft plan`: how much GPU and host memory will this run need, before anything is downloaded?"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rlr_peft.command_line import check_folder_or_exit, own_flags, own_parser
from rlr_peft.config import Config, ConfigError, load_config_or_exit
from rlr_peft.config.model import read_quantization
from rlr_peft.config.parsing import exit_with
from rlr_peft.foreign_text import say, shown_name

PROG = "rlr-peft plan"


def plan_command(words: Sequence[str]) -> int:
    """Prints the plan; exit code 1 where it does not fit the memory that was given."""
    own, rest = _own_flags(words)
    config = load_config_or_exit(rest, prog=PROG)
    if own.output is not None:
        check_folder_or_exit("--output", own.output.parent)

    # Only now the heavy imports: a wrong flag is refused at once.
    from rlr_peft.build.reporting import errors_only, reporting_errors
    from rlr_peft.plan.parts import host_plan
    from rlr_peft.plan.report import plan_text
    from rlr_peft.plan.run import plan_run

    with errors_only(), reporting_errors():
        plan = plan_run(config)
    host = host_plan(plan)
    say(plan_text(plan, _title(config), own.gpu_memory, own.host_memory))
    if own.output is not None:
        own.output.parent.mkdir(parents=True, exist_ok=True)
        own.output.write_text(
            json.dumps({**plan.as_plain(), "host": host.as_plain()}, indent=2) + "\n", encoding="utf-8"
        )
    fits = (own.gpu_memory is None or plan.fits(own.gpu_memory), own.host_memory is None or host.fits(own.host_memory))
    return 0 if all(fits) else 1


def _own_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the words that are left for the config."""
    parser = own_parser(
        PROG,
        "[--gpu_memory GIB] [--host_memory GIB] [--output FILE.json] [--config FILE] [--name VALUE ...]",
        "Adds up the GPU and host memory of a training config by parts, without weights and without a GPU.",
    )
    parser.add_argument(
        "--gpu_memory", type=float, default=None, metavar="GIB", help="say whether it fits so many GiB, and what helps"
    )
    parser.add_argument(
        "--host_memory", type=float, default=None, metavar="GIB", help="say whether so much host memory is enough"
    )
    parser.add_argument("--output", type=Path, default=None, metavar="FILE.json", help="write the numbers in bytes too")
    own, rest = own_flags(
        parser, words, "Every flag of training besides:", lambda: load_config_or_exit(["--help"], prog=PROG)
    )
    for flag in ("gpu_memory", "host_memory"):
        size = getattr(own, flag)
        if size is not None and not size > 0:
            exit_with(ConfigError(f"--{flag}: expected more than 0 GiB, got {size:g}; raise it."))
    return own, rest


def _title(config: Config) -> str:
    """What is planned, in words and without a path of this machine."""
    model, chain, training = config.model, config.chain, config.training
    name = model.pretrained_model_name_or_path
    size = f"{chain.height or chain.resolution} x {chain.width or chain.resolution} pixels"
    known = chain.height or chain.width or chain.resolution
    facts = [
        shown_name(name),
        size if known else "the pipeline's own size",
        *([f"{chain.num_frames} frames"] if chain.num_frames else []),
        f"batch {training.train_batch_size}",
        f"guidance {'of the pipeline' if chain.guidance_scale is None else format(chain.guidance_scale, 'g')}",
        {"no": "fp32"}.get(model.mixed_precision, model.mixed_precision),
        f"LoRA of rank {config.lora.rank}",
    ]
    if model.bnb_quantization_config_path is not None:
        is_4bit = read_quantization(model.bnb_quantization_config_path).get("load_in_4bit")
        facts.append(f"base in {4 if is_4bit else 8} bits")
    switched = ("gradient_checkpointing", "vae_gradient_checkpointing", "offload", "offload_text_encoders")
    facts += [option for option in switched if getattr(model, option, False)]
    return ", ".join(facts)
