"""`rlr-peft merge`: base and adapter as one pipeline."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from rlr_peft.config import ConfigError
from rlr_peft.config.checks import check_revision
from rlr_peft.config.parsing import exit_with, parse_or_exit
from rlr_peft.foreign_text import say

PROG = "rlr-peft merge"


def merge_command(words: Sequence[str]) -> int:
    """Loads both in float32, fuses the adapter into the base, saves the whole pipeline and its card."""
    arguments = parse_or_exit(_parser(), words)
    output = Path(arguments.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        say(f"error: --output: expected a new or empty folder, got {output}; choose another.", sys.stderr)
        return 2
    for problem in () if arguments.revision is None else check_revision("--revision", arguments.revision):
        exit_with(ConfigError(problem))

    from rlr_peft.build.reporting import set_up_logging

    set_up_logging()

    # Only now the heavy imports: a wrong flag is refused at once.
    import torch

    from rlr_peft.build.pipeline import DTYPES, load_pipeline
    from rlr_peft.build.reporting import as_config_error, reporting_errors
    from rlr_peft.chain.families import GENERIC, family_of_class
    from rlr_peft.chain.scheduler import build_scheduler
    from rlr_peft.config import ModelArguments
    from rlr_peft.durable_files import rename_directory
    from rlr_peft.lora import check_adapter, find_adapter, load_fitting_lora, merge_lora
    from rlr_peft.publishing.card import stored_record
    from rlr_peft.publishing.merged_card import Merged, write_merged_card

    with reporting_errors(), as_config_error():
        revision = arguments.adapter_revision
        adapter = find_adapter(arguments.adapter if revision is None else f"{arguments.adapter}@{revision}")
        check_adapter(adapter)
        base = ModelArguments(
            pretrained_model_name_or_path=arguments.base, revision=arguments.revision, variant=arguments.variant
        )
        pipeline = load_pipeline(base, torch.device("cpu"))
        load_fitting_lora(pipeline, adapter)
        record = stored_record(adapter.folder)  # of the adapter's run, where it lies beside it
        if record is not None and record.sampling.scheduler is not None:
            pipeline.scheduler = build_scheduler(
                pipeline.scheduler.config, record.sampling.scheduler, record.sampling.scheduler_options
            )
        merged = merge_lora(pipeline)
        if arguments.dtype != "fp32":
            pipeline.to(dtype=DTYPES[arguments.dtype])
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=output.parent) as aside:
            pipeline.save_pretrained(Path(aside) / "pipeline")
            family = family_of_class(type(pipeline).__name__) or GENERIC
            facts = Merged(
                base=arguments.base,
                base_revision=arguments.revision,
                adapter=arguments.adapter,
                adapter_revision=revision,
                parts=merged,
                dtype=str(DTYPES["no" if arguments.dtype == "fp32" else arguments.dtype]).removeprefix("torch."),
                pipeline_tag=family.pipeline_tag,
                tags=family.tags,
                record=record,
            )
            write_merged_card(Path(aside) / "pipeline", facts)
            if output.exists():
                output.rmdir()
            rename_directory(Path(aside) / "pipeline", output)
    say(f"Merged the adapter into the {' and the '.join(merged)}. Load the pipeline with")
    say(f"  pipe = diffusers.DiffusionPipeline.from_pretrained({str(output)!r})")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROG, description="Fuses an adapter into its base and saves a full pipeline.")
    parser.add_argument("--base", type=str, required=True, help="Hub id or folder of the base, or tiny-shapes")
    parser.add_argument("--adapter", type=str, required=True, help="folder, file or Hub id of the adapter")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="new folder of the pipeline")
    parser.add_argument(
        "--dtype", type=Literal["fp32", "fp16", "bf16"], default="fp32", help="number format of the saved weights"
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the base")
    parser.add_argument("--variant", type=str | None, default=None, help="variant of the base's weights, such as fp16")
    parser.add_argument("--adapter_revision", type=str | None, default=None, help="the same of the adapter")
    return parser
