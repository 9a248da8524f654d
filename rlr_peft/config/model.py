"""The base model and the adapter: knobs, and what of them cannot be together."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlr_peft.config.knob import ConfigError, Group, knob
from rlr_peft.errors import did_you_mean
from rlr_peft.files import PlainFileError, parse_json, quantizations, read_plain_text, stays_inside
from rlr_peft.foreign_text import listed

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config


DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "no": "float32"}
"""Number formats as torch calls them, by the names that flags have; `no` is what accelerate calls fp32."""


@dataclass(frozen=True)
class ModelArguments(Group):
    """Model: the pretrained pipeline and how it is held in memory"""

    pretrained_model_name_or_path: str = knob(
        MISSING,
        "Hub id or local folder of a diffusers pipeline, a single .safetensors file, or `tiny-shapes` for the embedded "
        "one.",
        found="model",
    )
    single_file_config: str | None = knob(
        None,
        "Hub id or local folder of a diffusers pipeline of the same family, for the configs and tokenizers that a "
        "single file lacks, and from a folder the text encoders; null takes those of the family from the Hub.",
        found="model",
    )
    revision: str | None = knob(None, "Branch, tag or commit of the Hub repository to load.", found="words")
    variant: str | None = knob(None, "Variant of the weight files to load, for example `fp16`.", found="words")
    cache_dir: str | None = knob(None, "Folder in which files downloaded from the Hub are kept.")
    pretrained_vae_model_name_or_path: str | None = knob(
        None,
        "Hub id or local folder of a VAE that replaces the pipeline's own, for example an fp16-safe SDXL VAE.",
        found="model",
    )
    pretrained_motion_adapter_name_or_path: str | None = knob(
        None,
        "Hub id or local folder of a motion adapter; it makes an AnimateDiff pipeline of a Stable Diffusion base.",
        found="model",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = knob(
        "no", "Number format of the frozen base weights; LoRA weights and latents always stay fp32."
    )
    gradient_checkpointing: bool = knob(
        False, "Recompute the denoiser's activations in the backward pass: less memory, more time."
    )
    offload_text_encoders: bool = knob(
        False,
        "Keep the text encoders in host memory; new prompts are encoded on the GPU block by block: less memory, a "
        "pause for each new prompt.",
    )
    vae_gradient_checkpointing: bool = knob(
        False, "Recompute the VAE decoder's activations in the backward pass: less memory, more time."
    )
    pretrained_tiny_vae_name_or_path: str | None = knob(
        None,
        "Hub id or local folder of an AutoencoderTiny that decodes for the training reward only, with far less memory; "
        "a biased objective, since validation and evaluation still use the real VAE.",
        found="model",
    )
    vae_tile_size: int | None = knob(
        None,
        "Decode for the training reward in tiles of so many pixels, each recomputed in the backward pass: memory for "
        "one tile; a slightly biased objective, since the VAE sees less of the image at once.",
        unit="pixels",
        within="[32, 16384]",
    )
    offload: bool = knob(
        False,
        "Keep text encoders, denoiser and VAE in host memory and only the one at work on the GPU: less memory, time "
        "for moving weights.",
    )
    bnb_quantization_config_path: str | None = knob(
        None,
        "JSON file of the arguments of BitsAndBytesConfig, or `nf4`: the frozen denoiser is held in 4 or 8 bits. "
        "Needs a GPU.",
    )
    attention_backend: str | None = knob(
        None, "Attention kernel of the denoiser by diffusers' names, for example `flash`; null leaves it to torch."
    )
    torch_compile: bool = knob(
        False, "Compile the denoiser's repeated blocks with torch.compile: slow to start, then faster."
    )
    allow_tf32: bool = knob(False, "Allow TF32 matrix products on Ampere and newer GPUs: faster, a little less exact.")
    full_determinism: bool = knob(
        False,
        "Use only kernels whose result is the same every time. On a GPU, two runs are equal byte for byte only "
        "with it; on a CPU they always are.",
    )

    def check(self, config: "Config") -> Iterator[str]:
        if self.revision is not None:
            yield from check_revision("revision", self.revision)
        if self.variant is not None and not re.fullmatch(r"[\w.-]+", self.variant):
            yield f"variant: expected a word of a file name such as fp16, got {self.variant!r}; correct it."
        yield from self._check_single_file()
        if self.vae_tile_size is not None and self.pretrained_tiny_vae_name_or_path is not None:
            yield (
                "vae_tile_size: expected the pipeline's own VAE, got pretrained_tiny_vae_name_or_path "
                f"{self.pretrained_tiny_vae_name_or_path}, which needs little memory as it is; drop one of the two."
            )
        path = self.bnb_quantization_config_path
        if path is not None:
            try:
                read_quantization(path)
            except ConfigError as error:
                yield str(error)
            if config.lora.use_dora:
                yield (
                    f"use_dora: expected a base in full width for DoRA's weight norms, got "
                    f"bnb_quantization_config_path {path}; drop one of the two."
                )
            if self.torch_compile:
                yield (
                    f"torch_compile: expected a base without bitsandbytes layers, got bnb_quantization_config_path "
                    f"{path}; drop one of the two."
                )
        if self.offload and self.torch_compile:
            yield (
                "torch_compile: expected weights that stay where they are, got offload, which moves them between "
                "phases; drop one of the two."
            )

    def _check_single_file(self) -> Iterator[str]:
        name = self.pretrained_model_name_or_path
        if not is_single_file(name):
            if self.single_file_config is not None:
                yield (
                    f"single_file_config: expected a .safetensors file as pretrained_model_name_or_path with it, got "
                    f"{name}; leave --single_file_config out."
                )
            return
        for option in ("variant", "pretrained_motion_adapter_name_or_path", "bnb_quantization_config_path"):
            if getattr(self, option) is not None:
                yield (
                    f"{option}: expected a folder or Hub id of a diffusers pipeline with it, got the single file "
                    f"{name}; leave --{option} out, or convert the file to a folder."
                )


def is_single_file(name: str) -> bool:
    """Whether a base is one file of weights under the keys of the original code."""
    return Path(name).suffix == ".safetensors" and Path(name).is_file()


@dataclass(frozen=True)
class LoraArguments(Group):
    """LoRA: the adapter that is trained"""

    rank: int = knob(4, "Rank of the LoRA matrices.", unit="dimensions", within="[1, 65536]")
    lora_alpha: float | None = knob(
        None, "LoRA scale: the update is multiplied by lora_alpha / rank; null means equal to rank.", within="(0, 1e6]"
    )
    lora_dropout: float = knob(
        0.0, "Share of the adapter's inputs dropped in training.", unit="fraction", within="[0, 1)"
    )
    lora_layers: str | None = knob(
        None,
        "Which layers get an adapter: `attention`, `all-linear`, or names of modules with commas between them; null "
        "means the family's default.",
        found="words",
    )
    denoiser: str | None = knob(
        None,
        "Comma-separated attributes of the pipeline that get an adapter; null means the family's (of Wan 2.2 both: "
        "`transformer` for high noise, `transformer_2` for low).",
        found="words",
    )
    use_dora: bool = knob(False, "Train DoRA: magnitude and direction of the weights apart.")
    use_rslora: bool = knob(False, "Scale the update by lora_alpha / sqrt(rank) instead of lora_alpha / rank.")
    output_kohya_format: bool = knob(
        False, "Save the adapter in kohya's format too, as kohya/lora_kohya.safetensors (Stable Diffusion and SDXL)."
    )
    init_lora_weights: Literal["gaussian", "kaiming", "orthogonal"] = knob(
        "gaussian", "How the LoRA matrices start; every choice starts at the base model's function."
    )
    init_adapter: str | None = knob(
        None,
        "Adapter from which training starts, in the formats that `rlr-peft compare` reads: a folder, a file or a "
        "repository of the Hub; null means the base.",
    )
    reference: Literal["base", "init_adapter"] = knob(
        "base", "What divergences, preferences and pulls are measured from: the base alone, or with the init_adapter."
    )

    @property
    def denoisers(self) -> list[str] | None:
        """The attributes of the pipeline that are trained; None leaves it to the family."""
        return None if self.denoiser is None else [name.strip() for name in self.denoiser.split(",")]

    def check(self, config: "Config") -> Iterator[str]:
        if self.reference == "init_adapter" and self.init_adapter is None:
            yield "reference: expected base without an init_adapter, got init_adapter; give --init_adapter."
        if self.reference == "init_adapter" and config.estimator.differentiates_reference:
            yield (
                f"reference: expected base with {config.estimator.estimator}, which differentiates it, got "
                "init_adapter; drop --reference."
            )
        if self.output_kohya_format and self.use_dora:
            yield (
                "output_kohya_format: expected plain LoRA, got use_dora, which cannot be converted; drop one of "
                "the two."
            )


_WIDTHS = ("load_in_4bit", "load_in_8bit")


def quantization_file(place: str) -> Path:
    """The file itself, or the shipped one of that name."""
    return quantizations().get(place, Path(place))


def read_quantization(place: str) -> dict[str, Any]:
    """The arguments of BitsAndBytesConfig in a JSON file.

    Raises:
        ConfigError: no such file, no JSON object, or not exactly one of 4 and 8 bits.
    """
    try:
        arguments = parse_json(read_plain_text(quantization_file(place)))
    except PlainFileError as error:
        raise ConfigError(
            f"bnb_quantization_config_path: expected a JSON file or {listed(quantizations(), 'or')}, got {place} "
            f"({error}); check the path and its text.{did_you_mean(place, quantizations())}"
        ) from error
    chosen = [name for name in _WIDTHS if isinstance(arguments, dict) and arguments.get(name) is True]
    if len(chosen) != 1:
        raise ConfigError(
            f"bnb_quantization_config_path: expected an object with {' or '.join(_WIDTHS)} true, got "
            f"{' and '.join(chosen) or 'neither'} in {place}; see diffusers' BitsAndBytesConfig."
        )
    return arguments


def check_revision(name: str, revision: str) -> Iterator[str]:
    """Yields what is wrong with the name of a branch, tag or commit, which becomes a path in the Hub's cache."""
    if not stays_inside(revision):
        yield f"{name}: expected a branch, tag or commit of the repository, got {revision!r}; correct it."
