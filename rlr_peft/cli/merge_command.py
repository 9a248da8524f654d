"""`rlr-peft merge`: base and adapter as one pipeline."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from rlr_peft.errors import UserError

PROG = "rlr-peft merge"


def merge_command(words: Sequence[str]) -> int:
    """Loads both in float32, fuses the adapter into the base and saves the whole pipeline; returns the exit code."""
    arguments = _parser().parse_args(list(words))
    output = Path(arguments.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        print(f"error: --output: expected a new or empty folder, got {output}; choose another.", file=sys.stderr)
        return 2

    from rlr_peft.training.logs import set_up_logging

    set_up_logging()

    # Only now the heavy imports: a wrong flag is refused at once.
    import torch

    from rlr_peft.config import ModelArguments
    from rlr_peft.durable_files import rename_directory
    from rlr_peft.lora import load_lora
    from rlr_peft.lora.merge import merge_lora
    from rlr_peft.training.errors import as_config_error, reporting_errors
    from rlr_peft.training.loading import DTYPES, load_pipeline

    with reporting_errors(), as_config_error():
        base = ModelArguments(pretrained_model_name_or_path=arguments.base, revision=arguments.revision)
        pipeline = load_pipeline(base, torch.device("cpu"))
        load_lora(pipeline, _adapter_folder(arguments.adapter, arguments.adapter_revision))
        merged = merge_lora(pipeline)
        if arguments.dtype != "fp32":
            pipeline.to(dtype=DTYPES[arguments.dtype])
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=output.parent) as aside:
            pipeline.save_pretrained(Path(aside) / "pipeline")
            if output.exists():
                output.rmdir()
            rename_directory(Path(aside) / "pipeline", output)
    print(f"Merged the adapter into the {' and the '.join(merged)}. Load the pipeline with")
    print(f"  pipe = diffusers.DiffusionPipeline.from_pretrained({str(output)!r})")
    return 0


def _adapter_folder(adapter: str, revision: str | None) -> Path:
    """A local folder as it is; of a Hub repository the adapter's files alone."""
    if Path(adapter).is_dir():
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from rlr_peft.publishing.background_push import ADAPTERS
    from rlr_peft.publishing.hub_client import FAILURES, in_words

    try:
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=list(ADAPTERS)))
    except (HFValidationError, *FAILURES) as error:
        raise UserError(
            f"--adapter: expected a folder or a Hub repository, got {adapter}. {in_words(error)}"
        ) from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROG, description="Fuses an adapter into its base and saves a full pipeline.")
    parser.add_argument("--base", type=str, required=True, help="Hub id or folder of the base, or tiny-shapes")
    parser.add_argument("--adapter", type=str, required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="new folder of the pipeline")
    parser.add_argument(
        "--dtype", type=Literal["fp32", "fp16", "bf16"], default="fp32", help="number format of the saved weights"
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the base")
    parser.add_argument("--adapter_revision", type=str | None, default=None, help="the same of the adapter")
    return parser
