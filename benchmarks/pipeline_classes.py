"""Which text-to-image and text-to-video classes of the installed diffusers can be trained: all are tried, tiny.

    git clone --depth 1 https://github.com/huggingface/diffusers outputs/diffusers
    python -m benchmarks.pipeline_classes --tests outputs/diffusers/tests

A class works if, on random weights: the chain draws without noise what the pipeline draws by itself; a sampled step
with noise is replayed bit for bit; a reward's gradient reaches LoRA weights through decoder and denoiser; and the saved
adapter, loaded as users load it, draws the same images bit for bit.
"""

import argparse
import copy
import inspect
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from benchmarks.machine import read_results, write_results
from benchmarks.pipeline_parts import build, calling_with, text_to_pixels, use_tests
from rlr_peft.build import prepare_pipeline
from rlr_peft.chain import (
    FRAMES_ARGUMENTS,
    build_scheduler,
    default_lora_targets,
    families,
    family_of,
    family_of_class,
    refusal,
)
from rlr_peft.config import ModelArguments
from rlr_peft.lora import attach_lora, save_lora, verify_lora_reloads
from tests.families.image_pipelines import sana, sd3, z_image
from tests.families.video_pipelines import text_to_video_sd
from tests.pipelines import chain_over

PROMPTS, SEEDS = ["a red ball", "sky"], [3, 4]
BEGIN, END = "<!-- classes: made by benchmarks/pipeline_classes.py -->", "<!-- end of classes -->"
UNTRIED = {
    "AltDiffusionPipeline": "deprecated; its text encoder is a class of diffusers' own that nobody makes tiny here",
    "BriaFibo2Pipeline": "nobody makes its `BriaFibo2Transformer2DModel` and Qwen3-VL tiny here",
    "Cosmos3OmniPipeline": "nobody makes the tokenizer of its tests tiny here",
    "ErnieImagePipeline": "nobody makes its `ErnieImageTransformer2DModel` and Mistral3 tiny here",
    "Ideogram4Pipeline": "two denoisers, `transformer` and `unconditional_transformer`, which nobody makes tiny here",
    "LongCatImagePipeline": "its call has the text encoder rewrite the prompt first, which a tiny random one cannot",
    "OmniGenPipeline": "its code needs torchvision, which is not installed here",
    "QwenImage21Pipeline": "nobody makes its `QwenImage21Transformer2DModel`, VAE and Qwen3-VL tiny here",
}
"""Classes that could not be built here, and what would have to be there."""


def of_parts(kind: type[DiffusionPipeline], make: Callable[[], DiffusionPipeline], **others: Any) -> DiffusionPipeline:
    """A class without tests, from the parts of a related pipeline as far as it takes them."""
    taken = inspect.signature(kind.__init__).parameters
    parts = make().components | others
    return kind(**{name: part for name, part in parts.items() if name in taken})


OWN: dict[str, Callable[[], DiffusionPipeline]] = {
    "StableDiffusion3Pipeline": sd3,  # of diffusers' tests it has a single layer, which lacks some of the row's targets
    "TextToVideoSDPipeline": text_to_video_sd,
    "SanaPAGPipeline": lambda: of_parts(diffusers.SanaPAGPipeline, sana),  # diffusers' tests take logits for embeddings
    "ZImageOmniPipeline": lambda: of_parts(diffusers.ZImageOmniPipeline, z_image, siglip=None, siglip_processor=None),
}
LIMIT = 180
"""Seconds of the processor for one class."""
SIZES = ("height", "width", "num_frames", "max_sequence_length")
NOT_CALLED = {
    *("prompt", "negative_prompt", "generator", "num_inference_steps", "output_type", "return_dict", "latents"),
    *("image", "conditions"),  # texts alone are tried
}


def try_class(pipeline: Any, inputs: dict[str, Any]) -> None:
    """Drives, trains and saves a pipeline.

    Raises:
        Exception: whatever does not work.
    """
    kind = type(pipeline)
    taken = set(inspect.signature(inspect.unwrap(kind.__call__)).parameters)
    frames = next((name for name in FRAMES_ARGUMENTS if name in taken), "num_frames")
    small = {"height": 32, "width": 32, "num_frames": inputs.get(frames, 3)} | inputs
    taken = {name for name in SIZES if name in small and (name in taken or (name == "num_frames" and frames in taken))}
    options = {"num_inference_steps": 3} | {name: small[name] for name in taken}
    with calling_with(kind, {name: value for name, value in inputs.items() if name not in NOT_CALLED}):
        check_drawing(copy.deepcopy(pipeline), options)
        check_training(pipeline, options)


def check_drawing(pipeline: Any, options: dict[str, Any]) -> None:
    """Without noise the chain's images are the pipeline's own.

    Raises:
        AssertionError: they are others.
    """
    chain = chain_over(pipeline, eta=0.0, **options)
    prompts, seeds = PROMPTS[:1], SEEDS[:1]  # what some pipelines draw depends on the other prompts of a batch
    with torch.no_grad():
        images = chain.decode(chain.sample(prompts, seeds).latents[0], prompts)
    scheduler = chain.inference_scheduler()
    assert scheduler.difference is None, scheduler.difference
    told = () if scheduler.sigmas_in_call else scheduler.sigmas
    pipeline.scheduler = build_scheduler(pipeline.scheduler.config, scheduler.class_name, scheduler.options, told)
    call = chain.call_arguments | scheduler.call_options()
    call |= {"num_inference_steps": chain.num_steps, "generator": torch.Generator().manual_seed(*seeds)}
    own = pipeline(prompt=prompts, output_type="pt", return_dict=False, **call)[0]
    assert images.shape == own.shape, f"the chain's images are {tuple(images.shape)}, its own {tuple(own.shape)}"
    assert images.isfinite().all() and images.std() > 1e-3, "its images are constant or not finite: they prove nothing"
    worst = (images - own).abs().max().item()
    assert worst < 1e-4, f"without noise the chain's images are not its own: they differ by {worst:.2g}"


def check_training(pipeline: Any, options: dict[str, Any]) -> None:
    """A replayed step, a gradient, and an adapter that comes back.

    Raises:
        AssertionError: something differs.
    """
    family = family_of(pipeline)
    parameters: list[torch.nn.Parameter] = []
    for name in family.denoisers:
        denoiser = getattr(pipeline, name)
        parameters += attach_lora(denoiser, target_modules=default_lora_targets(family, denoiser))
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    chain = chain_over(pipeline, parameters=parameters, eta=0.7, **options)
    trajectory = chain.sample(PROMPTS, SEEDS)
    for t in (1, 2):
        step = chain.replay(trajectory, t)
        same = torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1])
        assert same, f"replayed, step {t} does not come out as it was sampled"
    images = chain.decode(0.1 * step.mean, PROMPTS)  # far from where pixels are clamped
    gradients = torch.autograd.grad(images.float().square().sum(), parameters, allow_unused=True)
    size = sum(gradient.abs().sum().item() for gradient in gradients if gradient is not None)
    assert 0 < size < float("inf"), f"the gradient of the adapter is {size:g}"

    def render(pipeline: Any) -> torch.Tensor:
        chain = chain_over(pipeline, eta=0.0, **options)
        return chain.decode(chain.sample(PROMPTS, SEEDS).latents[0], PROMPTS)

    with tempfile.TemporaryDirectory() as folder:
        save_lora(pipeline, folder)
        verify_lora_reloads(pipeline, folder, render)


def outcome(kind: type[DiffusionPipeline], tests: dict[str, type], show_traceback: bool) -> dict[str, Any]:
    """What came of a class."""
    if (reason := refusal(kind)) is not None:
        return {"works": False, "why": reason}
    if kind.__name__ not in tests and kind.__name__ not in OWN:
        return {"works": None, "why": UNTRIED.get(kind.__name__, "no tests of it in the checkout of diffusers")}
    torch.manual_seed(0)
    try:
        own = OWN.get(kind.__name__)
        pipeline, inputs = build(tests[kind.__name__]) if own is None else (own(), {})
        prepare_pipeline(pipeline, ModelArguments("tiny", mixed_precision="no"), torch.device("cpu"))
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return {"works": None, "why": UNTRIED.get(kind.__name__) or in_short(error)}
    row = family_of_class(kind.__name__)
    return {"row": row.name if row else None} | tried(pipeline, inputs, show_traceback)


def tried(pipeline: Any, inputs: dict[str, Any], show_traceback: bool) -> dict[str, Any]:
    """Whether it works, on a copy, and if not why."""
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        try_class(copy.deepcopy(pipeline), inputs)
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return {"works": False, "why": in_short(error.__cause__ or error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"works": True, "why": ""}


def too_long(*_: Any) -> None:
    """Raises: TimeoutError: always."""
    raise TimeoutError(f"not done after {LIMIT} s")


def in_short(error: BaseException) -> str:
    """The error on one line."""
    words = " ".join(str(error).split())
    return words if isinstance(error, AssertionError) and words else f"{type(error).__name__}: {words}"[:300]


def table(results: dict[str, dict[str, Any]]) -> str:
    """All classes in Markdown, by what came of them."""

    def named(chosen: list[str]) -> str:
        return ", ".join(f"`{name.removesuffix('Pipeline')}`" for name in chosen)

    def by_reason(outcome: bool | None) -> list[str]:
        of_reason: dict[str, list[str]] = {}
        for name, result in results.items():
            if result["works"] is outcome:
                of_reason.setdefault(escaped(result["why"]), []).append(name)
        return [f"| {named(names)} | {why} |" for why, names in of_reason.items()]

    works = [name for name, result in results.items() if result["works"]]
    lines = [
        f"{len(results)} classes, {len(works)} work: {len([n for n in works if not results[n]['row']])} as they are.",
        "",
        "| | classes |",
        "|---|---|",
        f"| work, with a row | {named([name for name in works if results[name]['row']])} |",
        f"| work as they are | {named([name for name in works if not results[name]['row']])} |",
        "",
        "| does not work | why |",
        "|---|---|",
    ]
    lines += by_reason(False)
    lines += ["", "| not tried | why |", "|---|---|", *by_reason(None)]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """In a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def write_docs(results: dict[str, dict[str, Any]]) -> None:
    """Between the marks of docs/pipelines.md."""
    page = Path(__file__).parents[1] / "docs" / "pipelines.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    signal.signal(signal.SIGPROF, too_long)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, required=True, help="folder `tests` of a checkout of diffusers")
    parser.add_argument("--only", nargs="*", help="names of classes; the results of the others stay")
    parser.add_argument("--generic", action="store_true", help="as if no class had a row; nothing is written")
    parser.add_argument("--traceback", action="store_true")
    arguments = parser.parse_args()
    kinds = [kind for kind in text_to_pixels() if arguments.only is None or kind.__name__ in arguments.only]
    if arguments.generic:
        families.FAMILIES = ()  # type: ignore[assignment]
    tests = use_tests(arguments.tests, {kind.__name__ for kind in kinds})
    for kind in kinds:
        found = outcome(kind, tests, arguments.traceback)
        print(kind.__name__, found, flush=True)
        if not arguments.generic:
            results = read_results("pipeline_classes").get("classes", {}) | {kind.__name__: found}
            write_results("pipeline_classes", {"classes": dict(sorted(results.items()))})
    if not arguments.generic:
        write_docs(results)


if __name__ == "__main__":
    main()
