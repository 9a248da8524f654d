"""Tiny pipelines of all classes of diffusers, with random weights, from the components that its own tests make.

The tests are not installed with diffusers: give the folder `tests` of a checkout. What they would fetch from the Hub,
tokenizers and configs, is made here.
"""

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import TestCase, mock

import diffusers
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.families import text_encoders
from tests.pipelines import letter_tokenizer

PACKAGE = "tests_of_diffusers"
OTHER_TASKS = re.compile(
    "Img2Img|Inpaint|Control|ImageToVideo|Image2Video|VideoToVideo|VideoToWorld|2V(?!A)|I2I|Edit|Upscal|Audio|Music"
    "|AceStep|SuperResolution|Prior|DecoderPipeline|Kontext|Fill|Adapter|Pix2Pix|Onnx|ShapE|LLaDA|Gemma|GLIGEN|Layered"
    "|I2VGen|Transfer|HDR|InContext|DreamLite|VACE|Cycle|AttendAnd|Refiner|Depth2|Panorama|Paradigms|LDM3D"
)
"""In the names of classes that do something else than drawing from a text alone."""


def text_to_pixels() -> list[type[DiffusionPipeline]]:
    """The text-to-image and text-to-video classes of the installed diffusers: no more than a prompt is needed."""
    found = []
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or (OTHER_TASKS.search(name) and "T2V" not in name):
            continue
        kind = getattr(diffusers, name)
        if not (inspect.isclass(kind) and issubclass(kind, DiffusionPipeline)):
            continue
        parameters = inspect.signature(inspect.unwrap(kind.__call__)).parameters
        needed = {n for n, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
        if "prompt" in parameters and not needed - {"self", "prompt", "args", "kwargs"}:
            found.append(kind)
    return found


def use_tests(folder: Path, names: set[str]) -> dict[str, type]:
    """From the name of a pipeline class to the class of its tests.

    Args:
        folder: `tests` of a checkout of diffusers.
        names: of the pipeline classes.
    """
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    for missing in ("parameterized", "requests_mock"):  # for running the tests, which nobody does here
        sys.modules.setdefault(missing, mock.MagicMock())
    common = f"{PACKAGE}.pipelines.test_pipelines_common"
    sys.modules["tests.pipelines.test_pipelines_common"] = importlib.import_module(common)
    found: dict[str, type] = {}
    for file in sorted(folder.glob("pipelines/*/test_*.py")):
        if not names & set(re.findall(r"pipeline_class = (\w+?)(?:Wrapper)?\s", file.read_text())):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(f"{PACKAGE}.pipelines.{file.parent.name}.{file.stem}")
        except Exception as error:  # its classes are reported as not tried
            print(f"{file.name} cannot be imported: {type(error).__name__}: {error}"[:200])
            continue
        for kind in vars(module).values():
            if inspect.isclass(kind) and "get_dummy_components" in dir(kind):
                tested = getattr(kind, "pipeline_class", None)
                if inspect.isclass(tested):
                    found.setdefault(tested.__name__.removesuffix("Wrapper"), kind)
    return found


def build(tests: type) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The pipeline that the tests try, and what they call it with besides the prompt."""
    case: Any = tests("get_dummy_components") if issubclass(tests, TestCase) else tests()
    with _without_hub():
        parts = case.get_dummy_components()
    for name, part in parts.items():
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer")) or parts.get("processor")
        if isinstance(part, PreTrainedModel) and name.startswith("text_encoder") and tokenizer is not None:
            size = len(getattr(tokenizer, "tokenizer", tokenizer))
            if part.get_input_embeddings().num_embeddings < size:
                part.resize_token_embeddings(size)
    if "HunyuanDiT" in case.pipeline_class.__name__:  # its positions assume a VAE that shrinks by 8
        parts["vae"] = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
        )
    if "Allegro" in case.pipeline_class.__name__:  # of a video smaller than a tile it would decode nothing
        parts["vae"].kernel = parts["vae"].stride = (8, 16, 16)
    scheduler = parts["scheduler"]
    asked = {name: False for name in ("clip_sample", "thresholding") if scheduler.config.get(name)}  # no checkpoint's
    if "Mochi" in case.pipeline_class.__name__:  # its checkpoint's
        asked["invert_sigmas"] = True
    parts["scheduler"] = scheduler.from_config(scheduler.config, **asked)
    pipeline = case.pipeline_class(**parts)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
            for weight in part.parameters():
                if not weight.any():  # layers that begin as zeros would hide what is behind them
                    nn.init.normal_(weight, std=0.1)
    module = sys.modules[type(pipeline).__module__]
    if not hasattr(module, "ftfy"):  # mends broken characters of prompts, and is not installed
        module.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    takes_device = "device" in inspect.signature(case.get_dummy_inputs).parameters
    inputs = case.get_dummy_inputs("cpu") if takes_device else case.get_dummy_inputs()
    return pipeline, inputs


@contextmanager
def calling_with(kind: type[DiffusionPipeline], defaults: dict[str, Any]) -> Iterator[None]:
    """Inside, the class's call has other defaults: sizes that a tiny pipeline needs and no flag sets."""
    call: Any = inspect.unwrap(kind.__call__)
    names = [n for n, p in inspect.signature(call).parameters.items() if p.default is not inspect.Parameter.empty]
    with mock.patch.object(
        call, "__defaults__", tuple(map(lambda n, old: defaults.get(n, old), names, call.__defaults__))
    ):
        yield


@contextmanager
def _without_hub() -> Iterator[None]:
    """Inside, `from_pretrained` of tokenizers, configs and text encoders makes tiny ones."""

    def tokenizer(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        return _made(name, TOKENIZERS)()

    def config(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        return _made(name, CONFIGS)()

    def model(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        return cls(kwargs.get("config") or _made(name, CONFIGS)())

    with (
        mock.patch.object(PreTrainedTokenizerBase, "from_pretrained", classmethod(tokenizer)),
        mock.patch.object(AutoTokenizer, "from_pretrained", classmethod(tokenizer)),
        mock.patch.object(AutoProcessor, "from_pretrained", classmethod(tokenizer)),
        mock.patch.object(transformers.ProcessorMixin, "from_pretrained", classmethod(tokenizer)),
        mock.patch.object(AutoConfig, "from_pretrained", classmethod(config)),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(model)),
    ):
        yield


def _made(name: str, table: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
    """By a word in the name of a repository.

    Raises:
        LookupError: no such word in the table.
    """
    found = next((make for word, make in table.items() if word in name.lower()), None)
    if found is None:
        raise LookupError(f"its tests need {name} of the Hub, for which there is no stand-in")
    return found


def _byte_tokenizer() -> Any:
    tokenizer = text_encoders.qwen_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"})
    return _with_start(tokenizer)


def _with_start(tokenizer: Any) -> Any:
    """So that the empty text too has a token."""
    start = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    return tokenizer


def _bert_tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *text_encoders.LETTERS]
    words += [f"##{letter}" for letter in text_encoders.LETTERS]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "clip": letter_tokenizer,
    "t5": text_encoders.t5_tokenizer,
    "gemma": lambda: _with_start(text_encoders.gemma_tokenizer()),
    "bertmodel": _bert_tokenizer,
    "qwen": _byte_tokenizer,
    "llama": _byte_tokenizer,
    "mistral": _byte_tokenizer,
    "glm": _byte_tokenizer,
    "hunyaunvideo": _byte_tokenizer,
}

SMALL = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={"vocab_size": 1000, "num_key_value_heads": 2, "head_dim": 8, **SMALL},
        vision_config={"image_size": 16, "patch_size": 8, **SMALL},
    ),
    "umt5": lambda: transformers.UMT5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4),
    "t5": lambda: transformers.T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4),
    "bertmodel": lambda: transformers.BertConfig(vocab_size=1000, **SMALL),
    "llama": lambda: transformers.LlamaConfig(vocab_size=1000, **(SMALL | {"hidden_size": 16})),
    "qwen2vl": lambda: transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 1000,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "num_key_value_heads": 2,
        }
        | (SMALL | {"hidden_size": 16, "num_attention_heads": 2}),
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    ),
}
