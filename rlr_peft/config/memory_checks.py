"""What can be known to be impossible of the options that save memory, from the configuration alone.

Each check yields one sentence per problem: what was expected, what was got, what to do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlr_peft.config.arguments import Config
from rlr_peft.config.knob import ConfigError
from rlr_peft.plain_files import PlainFileError, parse_json, read_plain_text

_WIDTHS = ("load_in_4bit", "load_in_8bit")


def check_memory(config: Config) -> Iterator[str]:
    """Yields every problem of the memory options."""
    path = config.model.bnb_quantization_config_path
    if path is not None:
        try:
            read_quantization(path)
        except ConfigError as error:
            yield str(error)
        if config.lora.use_dora:
            yield (
                f"use_dora: expected a base in full width for DoRA's weight norms, got bnb_quantization_config_path "
                f"{path}; drop one of the two."
            )
        if config.model.torch_compile:
            yield (
                f"torch_compile: expected a base without bitsandbytes layers, got bnb_quantization_config_path {path}; "
                "drop one of the two."
            )
    if config.model.offload and config.model.torch_compile:
        yield (
            "torch_compile: expected weights that stay where they are, got offload, which moves them between phases; "
            "drop one of the two."
        )


def read_quantization(path: str) -> dict[str, Any]:
    """The arguments of BitsAndBytesConfig in a JSON file.

    Raises:
        ConfigError: no such file, no JSON object, or not exactly one of 4 and 8 bits.
    """
    try:
        arguments = parse_json(read_plain_text(Path(path)))
    except PlainFileError as error:
        raise ConfigError(
            f"bnb_quantization_config_path: expected a JSON file, got {path} ({error}); check the path and its text."
        ) from error
    chosen = [name for name in _WIDTHS if isinstance(arguments, dict) and arguments.get(name) is True]
    if len(chosen) != 1:
        raise ConfigError(
            f"bnb_quantization_config_path: expected an object with {' or '.join(_WIDTHS)} true, got "
            f"{' and '.join(chosen) or 'neither'} in {path}; see diffusers' BitsAndBytesConfig."
        )
    return arguments
