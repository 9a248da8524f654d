"""A Gradio page that draws with base and adapter from the same noise: on this machine, or on the Hub as a Space.

`drawing.py` loads and draws, `app.py` is the page.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCardData

from rlr_peft.config import ConfigError
from rlr_peft.config.files import config_beside, read_found_config
from rlr_peft.config.model import is_single_file
from rlr_peft.files import SECOND_EXPERT
from rlr_peft.foreign_text import in_text
from rlr_peft.lora import AdapterFiles, check_adapter
from rlr_peft.publishing.card import names_in_words, stored_record
from rlr_peft.publishing.record import Adapter, Base, Rewards, RunRecord, Sampling, base_kind, base_license
from rlr_peft.publishing.snippet import call_arguments, pipeline_code, quoted

GRADIO = "6.31.0"  # the version that the page was looked at with
PACKAGES = ("diffusers", "transformers", "peft", "accelerate")
EXAMPLES = 5
CALL = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")
DRAWING = '''"""Draws a prompt with the base and with the adapter, from the same noise."""

import os
from pathlib import Path

os.chdir(Path(__file__).parent)  # the adapter lies here
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it would warn that no text encoder has an adapter

{pipeline}
TITLE = {title}
ABOUT = {about}
PROMPTS = {prompts}


def use_adapter(used):
    """Takes the adapter in or out; without it the pipeline is the base, bit for bit."""
    for part in pipe.components.values():
        for layer in part.modules() if isinstance(part, torch.nn.Module) else ():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(used)


def draw(prompt, seed):
    """Two PIL images: of the base and of the adapter."""
    images = []
    for used in (False, True):
        use_adapter(used)
        images += pipe(
            prompt=prompt,
{arguments}            generator=torch.Generator().manual_seed(int(seed)),
        ).images
    return tuple(images)
'''
APP = """# Start it with `python app.py`.

import gradio as gr
from drawing import ABOUT, PROMPTS, TITLE, draw

with gr.Blocks(title=TITLE) as demo:
    gr.Markdown(f"# {TITLE}\\n\\n{ABOUT}")
    with gr.Row(equal_height=False):
        with gr.Column():
            prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2)
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
            button = gr.Button("Draw both", variant="primary")
        pair = gr.ImageSlider(label="Base (left), adapter (right)", interactive=False)
    gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts")
    gr.on([button.click, prompt.submit], draw, [prompt, seed], pair)

if __name__ == "__main__":
    demo.launch()
"""
README = """---
{metadata}
---

# {title}

{about}

Run it here with `pip install -r requirements.txt` and `python app.py`; or publish this folder:

```bash
hf upload OWNER/NAME . . --type space
```
"""


def write_space(folder: Path, files: AdapterFiles, base: str | None = None) -> None:
    """Writes `app.py`, `drawing.py`, `requirements.txt`, `README.md` and a copy of the adapter.

    Args:
        folder: new or empty.
        base: Hub id or folder of the base; None for what the run's files beside the adapter say.

    Raises:
        AdapterFormatError: a file that is no adapter.
        ConfigError: no base is known, or one that draws videos.
    """
    check_adapter(files)
    record = _record(files, base)
    if record.sampling.fps is not None:
        raise ConfigError("adapter: expected one for images, got one for videos; draw with the code of its card.")
    names = names_in_words(record)
    about = " ".join(_about(record, names["base_text"]))
    folder.mkdir(parents=True, exist_ok=True)
    for path in files.paths:
        copy = folder / path.relative_to(files.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    # The adapter beside the page, not that of a repository: the page shows what was given.
    here = replace(record, adapter=replace(record.adapter, repo_id=None, revision=None))
    prompts = [*record.images.before_after_prompts, *record.prompts.shown, "a photo of a cat"][:EXAMPLES]
    texts = {
        "app.py": APP,
        "drawing.py": DRAWING.format(
            pipeline=pipeline_code(here, ["from peft.tuners.tuners_utils import BaseTunerLayer"]),
            title=quoted(names["title"]),
            about=quoted(about),
            prompts=f"[{', '.join(quoted(prompt) for prompt in dict.fromkeys(prompts))}]",
            arguments="".join(f"            {argument},\n" for argument in call_arguments(record, "")),
        ),
        "requirements.txt": "".join(f"{line}\n" for line in _requirements(record)),
        "README.md": README.format(metadata=_metadata(record, names["title"]), title=names["title"], about=about),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _record(files: AdapterFiles, base: str | None) -> RunRecord:
    """The run's facts; for an adapter without them, such as a checkpoint's, what its config says, or the base alone."""
    record = stored_record(files.folder)
    if record is not None and base is None:
        return record
    found = config_beside(str(files.folder))
    settings = {} if found is None else read_found_config(found, ("pretrained_model_name_or_path", *CALL))[0]
    base = base or settings.pop("pretrained_model_name_or_path", None)
    if base is not None and is_single_file(base):
        raise ConfigError(f"base: expected a Hub id or a folder, got the file {base}; give the folder of a run on it.")
    if base is None:
        raise ConfigError(f"base: expected a Hub id or a folder, got none, and {files.place} does not say it; give it.")
    second = [SECOND_EXPERT] if any(path.parent.name == SECOND_EXPERT for path in files.paths) else []
    return RunRecord(
        Base(base, license=base_license(base)),
        Rewards(""),
        {},
        adapter=Adapter(["transformer", *second], files.weight_name),
        sampling=Sampling(call=settings),
    )


def _about(record: RunRecord, base_text: str) -> list[str]:
    """What the page shows, in sentences of Markdown."""
    sentences = [f"Base and adapter draw the same prompt from the same noise. The base is {base_text}."]
    if record.sampling.words:
        sentences.append(f"Drawn with {in_text(record.sampling.words)}.")
    if record.sampling.difference:
        sentences.append(in_text(record.sampling.difference))
    if record.prompts.stages:
        sentences.append("The adapter was trained with a prompt for every stage; here one prompt is for all stages.")
    return sentences


def _requirements(record: RunRecord) -> list[str]:
    """The installed versions, with which the page draws as it does here; torch is the machine's own."""
    ours = ["rlr-peft"] if base_kind(record.base.model) == "embedded" else []
    return [f"gradio=={GRADIO}", *(f"{name}=={version(name)}" for name in PACKAGES), "torch", *ours]


def _metadata(record: RunRecord, title: str) -> str:
    """What a Space needs at the top of its README."""
    models = [record.base.model] if base_kind(record.base.model) == "hub" else []
    models += [record.adapter.repo_id] if record.adapter.repo_id else []
    licence = record.base.license.id
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=GRADIO, app_file="app.py", license=licence, models=models or None
    )
    return data.to_yaml()
