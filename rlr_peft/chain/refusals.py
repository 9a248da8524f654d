"""Pipeline classes of diffusers that no chain can drive: why, and what to take instead, before anything is loaded."""

import inspect

from diffusers import DiffusionPipeline

from rlr_peft.chain.families import family_of_class

CODE_BOOK = "it draws tokens of a code book, not latents with Gaussian noise; take StableDiffusion3Pipeline"
CONSISTENCY = "its scheduler takes the steps of a consistency model, not Gaussian steps along a path"
FLOW_MAP = "its scheduler jumps along a flow map, not in Gaussian steps along a path; take WanPipeline"
GUARDRAIL = (
    "its call demands a safety checker, which no gradient passes, and its licence forbids to leave the checker out"
)
PRIOR = "its prior draws another embedding at every call, so that no step can be taken again"
MOTION = "its call moves latents in steps 44 and 47 of a chain of its own"

REFUSED = {
    "AmusedPipeline": CODE_BOOK,
    "AnyFlowFARPipeline": FLOW_MAP,
    "AnyFlowPipeline": FLOW_MAP,
    "Cosmos2TextToImagePipeline": f"{GUARDRAIL}; take SanaPipeline",
    "Cosmos2_5_PredictBasePipeline": f"{GUARDRAIL}; take WanPipeline",
    "CosmosTextToWorldPipeline": f"{GUARDRAIL}; take WanPipeline",
    "GlmImagePipeline": (
        "a language model draws another layout of the image at every call, so that no step can be taken again; take "
        "CogView4Pipeline"
    ),
    "HeliosPyramidPipeline": (
        "it draws at three resolutions one after the other, with new noise in between; take HeliosPipeline"
    ),
    "IFPipeline": "it draws pixels, and its call takes no `latents` to go on from; take PRXPixelPipeline",
    "Kandinsky6TI2VAPipeline": (
        "it draws sound in the loop of its video, in another form than LTX-2; take Kandinsky5T2VPipeline"
    ),
    "KandinskyCombinedPipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "KandinskyPipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "KandinskyV22CombinedPipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "KandinskyV22Pipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "LDMTextToImagePipeline": "its call returns finished images alone, no latents; take StableDiffusionPipeline",
    "LTX2ConditionPipeline": "every token of its video has a noise level of its own; take LTX2Pipeline",
    "LTX2DFRPipeline": "every token of its video has a noise level of its own; take LTX2Pipeline",
    "LTX2DFRTemporalRefinePipeline": "it refines videos that another pipeline drew; take LTX2Pipeline",
    "LatentConsistencyModelPipeline": (
        f"{CONSISTENCY}; take the base that it was distilled from, or a base of few steps as `--config sdxl_turbo` does"
    ),
    "SanaSprintPipeline": f"{CONSISTENCY}; take SanaPipeline",
    "SemanticStableDiffusionPipeline": (
        "its guidance remembers the steps before, so that no step can be taken alone; take StableDiffusionPipeline"
    ),
    "SkyReelsV2DiffusionForcingPipeline": "every frame has a noise level of its own; take SkyReelsV2Pipeline",
    "StableCascadeCombinedPipeline": f"{PRIOR}; take StableDiffusionXLPipeline",
    "StableDiffusionSAGPipeline": (
        "its guidance blurs images by noise levels of its own scheduler; take StableDiffusionPAGPipeline"
    ),
    "StableUnCLIPPipeline": f"{PRIOR}; take StableDiffusionPipeline",
    "TextToVideoZeroPipeline": f"{MOTION}; take AnimateDiffPipeline",
    "TextToVideoZeroSDXLPipeline": f"{MOTION}; take AnimateDiffSDXLPipeline",
    "UnCLIPPipeline": f"{PRIOR}; take StableDiffusionPipeline",
    "UniDiffuserPipeline": (
        "its one transformer draws a picture and a text together, and diffusers has given it up; take "
        "StableDiffusionPipeline"
    ),
    "VQDiffusionPipeline": CODE_BOOK,
    "VersatileDiffusionTextToImagePipeline": (
        "its UNet is put together of two at every call, and diffusers has given it up; take StableDiffusionPipeline"
    ),
    "WuerstchenCombinedPipeline": f"{PRIOR}; take StableDiffusionXLPipeline",
}
"""By the name of a class: the reason, and a class that works in its place."""

NEEDED = ("prompt", "latents", "num_inference_steps", "output_type")
"""Arguments without which a call cannot be driven."""


def refusal(pipeline_class: type) -> str | None:
    """Why no chain can drive a class, whatever its weights, as half a sentence; None where one may."""
    name = pipeline_class.__name__
    if name in REFUSED:
        return REFUSED[name]
    if not issubclass(pipeline_class, DiffusionPipeline):  # a stand-in for one whose packages are missing
        return None
    parameters = inspect.signature(inspect.unwrap(pipeline_class.__call__)).parameters
    lacking = next((needed for needed in NEEDED if needed not in parameters), None)
    if lacking is not None:
        return f"its call takes no `{lacking}`"
    family = family_of_class(name)
    if "audio_latents" in parameters and not (family is not None and family.has_sound):
        return "it draws sound in the loop of its pictures, which is known of LTX2Pipeline alone"
    return None
