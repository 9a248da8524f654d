"""tiny-shapes: a small Stable Diffusion pipeline, the drawings it was trained on, and two judges of its images.

Importing this package is cheap: nothing here loads torch. The parts are

- ``scenes``: what can be drawn, captions and the train/test split;
- ``judges``: two frozen classifiers that read every attribute off an image.

How scenes are drawn, and how the shipped weights were made, is in ``benchmarks/tiny_shapes``
(``python -m benchmarks.tiny_shapes.build``).

The pipeline was left imperfect on purpose: trained on true captions alone it draws nearly every prompt right and leaves
a reward nothing to improve. In the last quarter of its training some captions therefore name a similar shape, color or
texture (``benchmarks/tiny_shapes/denoiser.py``), as captions collected from the web do. Its images are crisp, but about
one shape or color in ten and one texture in four is not the one asked for.
"""

from pathlib import Path

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

PIPELINE_NAME = "tiny-shapes"
"""The name that stands for the shipped pipeline wherever a model name or path is asked for."""

IMAGE_SIZE = 64
"""Side of every drawing and of every generated image, in pixels."""


def pipeline_path() -> Path:
    """Folder of the shipped pipeline, for ``StableDiffusionPipeline.from_pretrained``."""
    return Path(__file__).parent / "pipeline"


def judges_path() -> Path:
    """Folder of the two shipped judges (one safetensors file each)."""
    return Path(__file__).parent / "judges"
