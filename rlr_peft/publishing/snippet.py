"""The Python snippet of the card: it runs as it stands."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from rlr_peft.chain.families import adapter_folder, adapter_loading
from rlr_peft.publishing.record import (
    RunRecord,
    base_kind,
    whole_place,
)


def usage_snippet(record: RunRecord, prompt: str) -> str:
    """Code that loads the base and the adapter, draws one image and saves it as `image.png`.

    Without `record.adapter.repo_id` it must be run in the adapter's folder.
    """
    arguments = "".join(f"    {argument},\n" for argument in call_arguments(record, prompt))
    is_video = record.sampling.fps is not None
    imports = []
    condition = next((pair.condition for pair in record.images.pairs if pair.prompt == prompt and pair.condition), None)
    if condition is not None:
        imports.append("from diffusers.utils import load_image")
        where = (
            "" if record.adapter.repo_id is None else f"https://huggingface.co/{record.adapter.repo_id}/resolve/main/"
        )
        arguments = f"    image=load_image({quoted(where + condition)}),\n{arguments}"
    if is_video:
        imports.append("from diffusers.utils import export_to_gif")
        arguments += '    output_type="pil",\n'
        ending = f').frames[0]\nexport_to_gif(video, "video.gif", fps={record.sampling.fps})'
    else:
        ending = ').images[0]\nimage.save("image.png")'
    return (
        f"{pipeline_code(record, imports)}"
        f"\n{'video' if is_video else 'image'} = pipe(\n"
        f"    prompt={quoted(prompt)},\n"  # the first argument of FLUX.2 is an image
        f"{arguments}"
        "    generator=torch.Generator().manual_seed(0),\n"
        f"{ending}"
    )


def pipeline_code(record: RunRecord, others: Sequence[str] = ()) -> str:
    """Code that makes `pipe`, the base with the adapter, as the numbers were measured; it imports others, too."""
    kind = base_kind(record.base.model)
    pipeline_class, parts, part_classes = _parts(record)
    scheduler_imports, scheduler = _scheduler(record)
    classes = sorted({pipeline_class, *part_classes, *filter(None, [record.sampling.scheduler])})
    imports = ["import torch", f"from diffusers import {', '.join(classes)}"]
    if kind == "embedded":
        imports += ["", "from rlr_peft.tiny_shapes import pipeline_path"]
        base = "pipeline_path()"
    elif kind == "folder":
        base = quoted(whole_place(record.base.model))
    else:
        base = quoted(record.base.model)
    options = "".join(f", {name}={quoted(value)}" for name, value in record.base.options.items())
    loading_imports, loading = _loading(record)
    reads = "from_pretrained" if record.base.single_file_class is None else "from_single_file"
    return "\n".join(scheduler_imports + _sorted_imports(imports, [*loading_imports, *others])) + (
        f"\n\n{parts}pipe = {pipeline_class}.{reads}({base}{options}"
        f"{''.join(f', {name}={name}' for name in record.base.components)}, dtype=torch.{record.base.dtype})\n"
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f"{scheduler}{loading}\n"
    )


def call_arguments(record: RunRecord, prompt: str) -> list[str]:
    """Arguments of the pipeline's call that make it draw this prompt as it was measured, in Python."""
    given = dict(record.sampling.call)
    if prompt in record.sampling.negative_prompts:
        given["negative_prompt"] = record.sampling.negative_prompts[prompt]
    return [
        f"{name}={_levels(value) if name == 'sigmas' else _value(value)}"
        for name, value in given.items()
        if name.isidentifier()  # a record may have come with somebody's adapter
    ]


def told_sigmas(record: RunRecord) -> str:
    """The line that tells a pipeline's scheduler its noise levels where the call takes none; needs `partial`."""
    levels = _levels(record.sampling.scheduler_sigmas)
    return f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas={levels})\n"


def _scheduler(record: RunRecord) -> tuple[list[str], str]:
    """Imports and lines that give the pipeline the scheduler that the numbers were measured with."""
    sampling = record.sampling
    if sampling.scheduler is None:
        return [], ""
    options = {name: value for name, value in sampling.scheduler_options.items() if name.isidentifier()}
    given = "".join(f", {name}={_value(value)}" for name, value in options.items())
    lines = f"pipe.scheduler = {sampling.scheduler}.from_config(pipe.scheduler.config{given})\n"
    if sampling.scheduler_sigmas:
        return ["from functools import partial", ""], lines + told_sigmas(record)
    return [], lines


def _levels(sigmas: object) -> str:
    """Noise levels in Python: the evenly spaced ones 1, ..., 2/T, 1/T by their rule."""
    levels = [float(sigma) for sigma in sigmas] if isinstance(sigmas, Sequence) else []
    count = len(levels)
    if all(math.isclose(level, 1 - step / count, abs_tol=1e-9) for step, level in enumerate(levels)):
        return f"[1 - step / {count} for step in range({count})]"
    return repr(levels)


def _value(value: object) -> str:
    return quoted(value) if isinstance(value, str) else repr(value)


def _parts(record: RunRecord) -> tuple[str, str, list[str]]:
    """The pipeline's class, lines that load what is not the base's own, and the classes of that."""
    classes = {"motion_adapter": "MotionAdapter"}
    used = [classes.get(name, "AutoModel") for name in record.base.components]
    lines = [
        f"{name} = {class_name}.from_pretrained({quoted(whole_place(place))}, dtype=torch.{record.base.dtype})\n"
        for (name, place), class_name in zip(record.base.components.items(), used, strict=True)
    ]
    # A base of Stable Diffusion with a motion adapter is another pipeline than the base's own.
    of_videos = "motion_adapter" in record.base.components
    pipeline_class = "AnimateDiffPipeline" if of_videos else record.base.single_file_class or "DiffusionPipeline"
    return pipeline_class, "".join(lines), used


def _sorted_imports(imports: list[str], extra: list[str]) -> list[str]:
    """The third-party imports of both lists in order, then what stands after an empty line."""
    end = imports.index("") if "" in imports else len(imports)
    return [imports[0], *sorted(imports[1:end] + extra), *imports[end:]]


def _loading(record: RunRecord) -> tuple[list[str], str]:
    """Imports and lines that put the adapter into the pipeline."""
    adapter, weights = quoted(record.adapter.repo_id or "."), quoted(record.adapter.weight_name)
    if record.adapter.peft_config is not None:
        return _loading_through_peft(record)
    lines = []
    revision = "" if record.adapter.revision is None else f", revision={quoted(record.adapter.revision)}"
    for name in record.adapter.denoisers:
        # Without `weight_name` the file is guessed by asking the Hub, which fails offline and for private repositories.
        # (In a local folder diffusers takes the first expert's file if the second's is named by `subfolder`.)
        folder = adapter_folder(name)
        file = quoted(f"{folder}/{record.adapter.weight_name}") if folder else weights
        into = "".join(f", {option}={value}" for option, value in adapter_loading(name).items())
        lines.append(f"pipe.load_lora_weights({adapter}, weight_name={file}{into}{revision})")
    return [], "\n".join(lines)


def _loading_through_peft(record: RunRecord) -> tuple[list[str], str]:
    """diffusers has no loader for this denoiser; peft puts the same file into it."""
    (name,) = record.adapter.denoisers
    imports = [
        "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
        "from safetensors.torch import load_file",
    ]
    file = quoted(record.adapter.weight_name)
    if record.adapter.repo_id is not None:
        imports.append("from huggingface_hub import hf_hub_download")
        revision = "" if record.adapter.revision is None else f", revision={quoted(record.adapter.revision)}"
        file = f"hf_hub_download({quoted(record.adapter.repo_id)}, {file}{revision})"
    options = ", ".join(f"{key}={value!r}" for key, value in (record.adapter.peft_config or {}).items())
    return imports, (
        f"weights = {{key.removeprefix({quoted(name + '.')}): value for key, value in load_file({file}).items()}}\n"
        f"inject_adapter_in_model(LoraConfig({options}), pipe.{name})\n"
        f"set_peft_model_state_dict(pipe.{name}, weights)"
    )


def quoted(text: str) -> str:
    """A Python string in double quotes: every JSON string is one."""
    return json.dumps(text, ensure_ascii=False)
