"""`rlr-peft plan`: how much GPU and host memory will this run need, before anything is downloaded?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlr_peft.config import Config
from rlr_peft.config.arguments import knobs
from rlr_peft.config.knob import Group, knob
from rlr_peft.config.model import read_quantization
from rlr_peft.config.parsing import check_output, read_words
from rlr_peft.foreign_text import listed, say, shown_name
from rlr_peft.reports import write_numbers
from rlr_peft.rewards.names import refuse_unknown

PROG = "rlr-peft plan"
DESCRIPTION = "Add up the GPU and host memory that a training needs, without weights or a GPU."


@dataclass(frozen=True)
class PlanFlags(Group):
    """The plan"""

    gpu_memory: float | None = knob(
        None, "Your GPU's memory: say whether the training fits, and what helps if not.", unit="GiB", within="(0, inf)"
    )
    host_memory: float | None = knob(
        None, "Your machine's memory: say whether it is enough.", unit="GiB", within="(0, inf)"
    )
    num_processes: int = knob(
        1,
        "Processes, each with a GPU, that share the denoiser with --shard_denoiser.",
        unit="processes",
        within="[1, inf)",
    )
    output: str | None = knob(None, "JSON file that gets the numbers, in bytes.")


def plan_command(words: Sequence[str]) -> int:
    """Prints the plan; exit code 1 where it does not fit the memory that was given."""
    said = read_words(words, PlanFlags, PROG, DESCRIPTION, list(knobs()), example="--config sdxl --gpu_memory 24")
    own, config = said.own, said.config()
    if own.output is not None:
        check_output(Path(own.output), is_file=True)
    refuse_unknown(config.reward.specs)

    # Only now the heavy imports: a wrong flag is refused at once.
    from rlr_peft.build.reporting import errors_only
    from rlr_peft.plan.parts import host_plan
    from rlr_peft.plan.report import plan_text
    from rlr_peft.plan.run import plan_run

    with errors_only():
        plan = plan_run(config, own.num_processes)
    host = host_plan(plan)
    title = _title(config, own.num_processes)
    say(plan_text(plan, title, own.gpu_memory, own.host_memory, last_resorts(config)))
    if own.output is not None:
        write_numbers(Path(own.output), {**plan.as_plain(), "host": host.as_plain()})
    fits = (own.gpu_memory is None or plan.fits(own.gpu_memory), own.host_memory is None or host.fits(own.host_memory))
    return 0 if all(fits) else 1


def last_resorts(config: Config) -> str:
    """What may be made smaller, or cheaper, at the price of another training."""
    is_batch = config.training.train_batch_size > 1
    ways = ["lower --train_batch_size (and raise --gradient_accumulation_steps)"] if is_batch else []
    ways.append("lower --resolution or, of a video, --num_frames and --decoded_frames")
    if config.model.mixed_precision == "no":
        ways.append("use --mixed_precision bf16")
    if config.model.pretrained_tiny_vae_name_or_path is None:
        ways.append("decode with --pretrained_tiny_vae_name_or_path or, of an AutoencoderKL, --vae_tile_size")
    return listed(ways, "or")


def _title(config: Config, num_processes: int) -> str:
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
    if training.shard_denoiser:
        facts.append(f"denoiser shared by {num_processes} processes")
    switched = ("gradient_checkpointing", "vae_gradient_checkpointing", "offload", "offload_text_encoders")
    if model.vae_tile_size is not None:
        facts.append(f"decoded in tiles of {model.vae_tile_size} pixels")
    facts += [option for option in switched if getattr(model, option)]
    return ", ".join(facts)
