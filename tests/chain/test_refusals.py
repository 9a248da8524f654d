"""Classes that no chain can drive are told from others by their class alone, with one that works in their place."""

import re

import diffusers
import pytest

from benchmarks.machine import read_results
from rlr_peft.chain import REFUSED, refusal
from tests.pipelines import chain_over, tiny_stable_diffusion


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_taken_instead_works(name: str) -> None:
    """As `python -m benchmarks.pipeline_classes` found it."""
    works = {kind for kind, result in read_results("pipeline_classes")["classes"].items() if result["works"]}
    assert refusal(getattr(diffusers, name)) == REFUSED[name]
    advice = REFUSED[name].split("; take ")[1]
    assert set(re.findall(r"\w+Pipeline", advice)) <= works
    assert "Pipeline" in advice or "--config" in advice


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DDPMPipeline", "its call takes no `prompt`"),
        ("IFSuperResolutionPipeline", "its call takes no `latents`"),
        (
            "LTX2ImageToVideoPipeline",
            "it draws sound in the loop of its pictures, which is known of LTX2Pipeline alone",
        ),
    ],
)
def test_what_a_call_shows_by_its_arguments(name: str, reason: str) -> None:
    assert refusal(getattr(diffusers, name)) == reason


def test_supported_classes_are_not_refused() -> None:
    for family in ("StableDiffusionPipeline", "LTX2Pipeline", "QwenImageEditPipeline", "WanImageToVideoPipeline"):
        assert refusal(getattr(diffusers, family)) is None


def test_the_chain_refuses_such_a_pipeline() -> None:
    class SanaSprintPipeline(diffusers.StableDiffusionPipeline):
        """By its name."""

    parts = tiny_stable_diffusion().components
    with pytest.raises(ValueError, match=r"SanaSprintPipeline cannot be driven as a chain: .*; take SanaPipeline\.$"):
        chain_over(SanaSprintPipeline(**parts, requires_safety_checker=False))
