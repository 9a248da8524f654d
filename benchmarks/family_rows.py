"""Which rows of ``rlr_peft/chain/families.py`` a class could do without: each is taken away, its pipeline tried, tiny.

    python -m benchmarks.family_rows

The generic row drives what is left. `stops` says where it does not, `differs` which answers of the row are missing, of
those that change what is drawn or trained, and `apart` which of the others. Writes
``benchmarks/results/family_rows.json``.
"""

from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import write_results
from benchmarks.pipeline_classes import check_drawing, check_training, in_short
from rlr_peft.build import prepare_pipeline
from rlr_peft.chain import default_lora_targets, families, family_of
from rlr_peft.config import ModelArguments
from tests.families.table import CASES

FIRST_CASES = {
    "stable-diffusion": "sd-epsilon",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3",
    "flux": "flux",
    "qwen-image": "qwen-image",
    "pixart-sigma": "pixart-sigma",
    "sana": "sana",
    "z-image": "z-image",
    "text-to-video-sd": "text-to-video-sd",
    "animatediff": "animatediff",
    "wan": "wan-2.2",
    "cogvideox": "cogvideox",
    "ltx-video": "ltx",
}
"""By the row's name: the case of the tests that is tried. Rows of pictures are needed for what they tell of these."""
COMPARED = ("timestep_spacing", "guidance_argument", "no_guidance", "frame_axis", "pipeline_tag", "denoisers")


def adapted(family: Any, pipeline: Any) -> set[str]:
    """The layers that get LoRA by default."""
    found = set()
    for name in family.denoisers:
        denoiser = getattr(pipeline, name)
        targets = default_lora_targets(family, denoiser)
        found |= {
            f"{name}.{layer}"
            for layer, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear) and any(f".{layer}".endswith(f".{target}") for target in targets)
        }
    return found


def prepared(case: str) -> Any:
    """The pipeline of a case of the tests, as a run makes it ready."""
    pipeline = CASES[case].build()
    prepare_pipeline(pipeline, ModelArguments("tiny", mixed_precision="no"), torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_row(row: str, case: str) -> dict[str, Any]:
    """What a class loses without its row."""
    torch.manual_seed(0)
    pipeline = prepared(case)
    own = family_of(pipeline)
    with patch.object(families, "FAMILIES", tuple(one for one in families.FAMILIES if one.name != row)):
        generic = family_of(pipeline)
        differs = [name for name in COMPARED if getattr(own, name) != getattr(generic, name)]
        layers, others = adapted(own, pipeline), adapted(generic, pipeline)
        if layers != others:
            differs.append(f"{len(others)} layers get LoRA, not {len(layers)}")
        try:
            check_drawing(prepared(case), CASES[case].options)
            check_training(prepared(case), CASES[case].options)
            stops = None
        except Exception as error:
            stops = in_short(error)
    apart = [name for name in ("tags", "negative_branch") if getattr(own, name) != getattr(generic, name)]
    return {"row": row, "stops": stops, "differs": differs, "apart": apart}


def main() -> None:
    """Tries all rows, prints and writes."""
    torch.set_num_threads(1)
    rows = []
    for row, case in FIRST_CASES.items():
        rows.append(without_row(row, case))
        print(rows[-1], flush=True)
    print(write_results("family_rows", {"rows": rows}))


if __name__ == "__main__":
    main()
