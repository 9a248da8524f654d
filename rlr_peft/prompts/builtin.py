"""The prompt sets that ship with the package."""

from rlr_peft.tiny_shapes import scenes

# The 45 common animals of DDPO's aesthetic experiment (arXiv:2305.13301), a prompt each.
ANIMALS = tuple(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo".split()
)
HELD_BACK_ANIMALS = ("zebra", "raccoon", "beetle", "dolphin", "goose", "hedgehog")
"""Never trained on with ``simple-animals/train``: mammals, a bird and an insect."""


def builtin_prompts(name: str) -> list[str] | None:
    """The prompts of a built-in set in a fixed order; None for a name that is none."""
    if name == "tiny-shapes/train":
        return scenes.prompts("train")
    if name == "tiny-shapes/test":
        return scenes.prompts("test")
    if name == "simple-animals":
        return list(ANIMALS)
    if name == "simple-animals/train":
        return [animal for animal in ANIMALS if animal not in HELD_BACK_ANIMALS]
    return list(HELD_BACK_ANIMALS) if name == "simple-animals/test" else None
