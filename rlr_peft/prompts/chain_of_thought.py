"""Stage prompts for the Diffusive Chain-of-Thought: whoever splits a prompt, and the file that remembers it.

The rules need no language model and give the same answer every time. Captions of tiny-shapes are split exactly, by the
scale of every attribute. Of any other text the subject stays in every stage, and its phrases are sorted by the words in
them; it is a rough sort, and the file of stage prompts can be edited. Stages add to what was told before and take
nothing back: guidance that stops naming what is drawn already lets it fade (``benchmarks/dcot.py`` measures it).
"""

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlr_peft import tiny_shapes
from rlr_peft.files import parse_json
from rlr_peft.prompt import Prompt, PromptError, PromptLike, as_prompt

Decomposer = Callable[[str], Sequence[str]]
"""Splits a prompt into one text per stage, noise first; raises ``PromptError`` for one that it cannot split."""

STAGE_PROMPTS_FILE = "stage_prompts.jsonl"
"""Name, in a run's output folder, of the file that remembers what models answered."""
MAX_STAGE_PROMPT_LENGTH = 1000
"""Characters; what is longer is no prompt but a model that does not stop."""
MAX_ANSWER_LENGTH = 50_000
"""Characters of a model's answer, thoughts before the stage prompts included."""


class MalformedStagesError(ValueError):
    """An answer that is not one text per stage; the message says what is wrong with it, for another try."""


def decompose_prompts(prompts: Sequence[Prompt], decompose: Decomposer) -> list[Prompt]:
    """The same prompts with stage prompts; those of one text are asked for once.

    Raises:
        PromptError: a prompt cannot be split.
    """
    stages = {text: tuple(decompose(text)) for text in dict.fromkeys(prompt.text for prompt in prompts)}
    return [replace(prompt, stages=stages[prompt.text]) for prompt in prompts]


def parse_stages(answer: str, names: Sequence[str]) -> tuple[str, ...]:
    """The stage prompts of a model's answer: the first JSON object in it, with one text for every name.

    Raises:
        MalformedStagesError: anything else.
    """
    if len(answer) > MAX_ANSWER_LENGTH:
        raise MalformedStagesError(f"expected at most {MAX_ANSWER_LENGTH} characters, got {len(answer)}")
    problem = MalformedStagesError("no JSON object")
    # Braces may come in what a model says before its answer.
    for number, brace in enumerate(re.finditer(r"\{", answer)):
        try:
            found, _ = json.JSONDecoder().raw_decode(answer, brace.start())
            break
        except json.JSONDecodeError as error:
            if number == 0:
                problem = MalformedStagesError(f"not valid JSON ({error.msg} at character {error.pos})")
        except (RecursionError, ValueError):  # a ValueError of its own: Python reads no numbers of thousands of digits
            raise MalformedStagesError("not valid JSON (nested too deeply, or a number too long)") from None
    else:
        raise problem
    return check_stages(found, names)


def check_stages(found: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The texts of a mapping, in the order of the names.

    Raises:
        MalformedStagesError: a name is missing, there are others, or a text is none, blank or endless.
    """
    if not isinstance(found, Mapping) or set(found) != set(names):
        got = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise MalformedStagesError(f"expected the keys {', '.join(names)}, got {got or 'none':.200}")
    for name in names:
        text = found[name]
        if not isinstance(text, str) or not text.strip():
            raise MalformedStagesError(f"expected a text for {name}, got {text!r:.60}")
        if len(text) > MAX_STAGE_PROMPT_LENGTH:
            raise MalformedStagesError(
                f"expected at most {MAX_STAGE_PROMPT_LENGTH} characters for {name}, got {len(text)}"
            )
    return tuple(found[name].strip() for name in names)


class RememberedStages:
    """A decomposer with a memory that users can read and edit: a JSONL file, one prompt a line.

    A line is ``{"prompt": ..., STAGE: ..., ...}``. What stands there is used as it is; only prompts that are missing
    are split, and appended. Of two lines for one prompt the later one holds.

    Args:
        decompose: splits what the file does not hold.
        path: the file; it need not exist.

    Raises:
        PromptError: the file cannot be read, or a line is not of this form; the message names it.
    """

    def __init__(self, decompose: Decomposer, path: Path, names: Sequence[str]) -> None:
        self._decompose = decompose
        self._path = path
        self._names = tuple(names)
        self._known = read_stages(path, names) if path.exists() else {}

    def __call__(self, prompt: str) -> tuple[str, ...]:
        """The stage prompts, from the file or newly split."""
        if prompt not in self._known:
            stages = tuple(self._decompose(prompt))
            self._append({"prompt": prompt, **dict(zip(self._names, stages, strict=True))})
            self._known[prompt] = stages
        return self._known[prompt]

    def _append(self, entry: dict[str, str]) -> None:
        """On the disk before the next question: answers may have cost money."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # An editor may have left the last line without its end.
        starts_line = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("" if starts_line else "\n") + json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_stages(path: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What a file of ``RememberedStages`` holds: the stage prompts of every prompt in it.

    Raises:
        PromptError: the file cannot be read, or a line is not of this form; the message names it.
    """
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from error
    known: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line.decode("utf-8"))
            prompt = entry.pop("prompt")
            if not isinstance(prompt, str):
                raise MalformedStagesError(f"expected a text for prompt, got {prompt!r:.60}")
            known[prompt] = check_stages(entry, names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PromptError(
                f'{path}, line {number}: expected {{"prompt": ..., {", ".join(names)}}}: {error}; correct or delete '
                "the line"
            ) from error
    return known


def staged_prompt(
    given: PromptLike | Sequence[str] | Mapping[str, str], names: Sequence[str], decompose: Decomposer
) -> Prompt:
    """A prompt with stage prompts from whatever a person gives.

    Args:
        given: a text or a prompt without stage prompts, which is split; a prompt with them; a sequence of one text per
            stage; or a mapping of stage names to texts.
        names: of the stages, noise first.

    Raises:
        PromptError: another number of stages, other names, or something else than texts.
    """
    try:
        if isinstance(given, PromptLike):
            prompt = as_prompt(given)
            return replace(prompt, stages=_one_per_stage(prompt.stages or decompose(prompt.text), names))
        stages = check_stages(
            given if isinstance(given, Mapping) else dict(zip(names, _one_per_stage(given, names), strict=True)), names
        )
    except MalformedStagesError as error:
        raise PromptError(f"stage prompts of {given!r:.200}: {error}") from None
    return Prompt(stages[-1], stages=stages)


def _one_per_stage(texts: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Texts, which may be blank where the whole prompt is.

    Raises:
        MalformedStagesError: another number of them, or something else.
    """
    is_sequence = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_sequence or len(texts) != len(names) or not all(isinstance(text, str) for text in texts):
        got = f"{len(texts)}: {texts!r:.60}" if is_sequence else f"{texts!r:.60}"
        raise MalformedStagesError(f"expected one text for each of {', '.join(names)}, got {got}")
    return tuple(texts)


SCALES = ("coarse", "mid", "fine")

_COARSE_WORDS = frozenset(
    "background foreground left right top bottom center centre middle above below behind beside near far sky landscape "
    "scene view field forest beach city street room indoors outdoors mountain mountains sea ocean desert garden "
    "horizon "
    "composition wide panorama aerial night day sunset sunrise dawn dusk winter summer snow rain fog".split()
)
_FINE_WORDS = frozenset(
    "detail details detailed intricate texture textured pattern patterned striped stripes dotted dots checkered fur "
    "feathers scales hair skin eyes hands fingers freckles wrinkles outline outlined engraved embroidered glossy matte "
    "shiny metallic rough smooth sharp focus crisp photorealistic realistic 4k 8k hd quality bokeh grain brushstrokes "
    "style render rendered painting watercolor oil sketch".split()
)
# A phrase starts at a comma, or at a word that tells where, with what or in which style.
_PHRASE_STARTS = re.compile(
    r"\s*[,;]\s*|\s+(?=(?:on|in|at|under|behind|beside|near|above|below|against|with|wearing|holding|covered)\s)"
)


def decompose_by_rules(prompt: str) -> tuple[str, str, str]:
    """The coarse, mid and fine prompt of a text: each adds what belongs to its scale, so that fine is the whole text.

    A stage to which nothing belongs yet gets the whole text as well.
    """
    try:
        attributes = tiny_shapes.parse_caption(prompt)
    except ValueError:
        subject, *phrases = _phrases(prompt)
        scales = [_scale(phrase) for phrase in phrases]
        return _growing(prompt, phrases, scales, lambda chosen: ", ".join([subject, *chosen]))
    scales = [tiny_shapes.SCALES[name] for name in attributes]
    return _growing(
        prompt, list(attributes), scales, lambda names: tiny_shapes.describe({n: attributes[n] for n in names})
    )


def is_split_by_rules(text: str, stages: Sequence[str]) -> bool:
    """Whether the stage prompts are those of the rules, and not what somebody wrote."""
    return tuple(stages) == decompose_by_rules(text)


def _growing(
    prompt: str, parts: Sequence[str], scales: Sequence[str], describe: Callable[[list[str]], str]
) -> tuple[str, str, str]:
    texts = []
    for i in range(len(SCALES)):
        chosen = [part for part, scale in zip(parts, scales, strict=True) if scale in SCALES[: i + 1]]
        texts.append(describe(chosen) if 0 < len(chosen) < len(parts) else prompt)
    return texts[0], texts[1], texts[2]


def _scale(phrase: str) -> str:
    words = set(re.findall(r"\w+", phrase.lower()))
    fine, coarse = len(words & _FINE_WORDS), len(words & _COARSE_WORDS)
    if fine > coarse:
        return "fine"
    return "coarse" if coarse else "mid"


def without_stage(prompt: str, stages: Sequence[str], index: int) -> str | None:
    """A text without what one stage adds to those before it: what guidance steers away from there, in a contrast.

    Args:
        stages: what every stage tells of it, noise first, as rules, columns or models split it. One that tells all of
            it before the last adds nothing of its own.

    Returns:
        The rest of a caption of tiny-shapes or of a text's phrases; of a stage that was not cut out of the text, what
        the other stages tell. None for a stage that adds nothing, or without which nothing is left.
    """
    if stages[index] == prompt and (index < len(stages) - 1 or set(stages) == {prompt}):
        return None
    earlier = [stage for stage in stages[:index] if stage != prompt]
    try:
        whole = tiny_shapes.parse_caption(prompt)
        known = {name for stage in earlier for name in tiny_shapes.parse_caption(stage)}
        own = tiny_shapes.parse_caption(stages[index]).keys() - known
        rest = {name: value for name, value in whole.items() if name not in own}
        return tiny_shapes.describe(rest) if own and rest else None
    except ValueError:
        subject, *phrases = _phrases(prompt)
        told = {phrase for stage in earlier for phrase in _phrases(stage)}
        added = [phrase for phrase in _phrases(stages[index]) if phrase not in told and phrase != subject]
    if not set(added) <= set(phrases):
        return ", ".join(stage for number, stage in enumerate(stages) if number != index and stage != prompt) or None
    left = [phrase for phrase in phrases if phrase not in added]
    return ", ".join([subject, *left]) if added else None


def as_part(prompt: Prompt, index: int) -> Prompt:
    """What conditions a stage in the paper's form: its own text."""
    return replace(prompt, text=prompt.stages[index], stages=())


def as_contrast(prompt: Prompt, index: int) -> Prompt:
    """What conditions a stage in a contrast: the whole text, away from it without what the stage adds.

    A negative prompt of its own stays, and comes first.
    """
    told = (prompt.negative_prompt, without_stage(prompt.text, prompt.stages, index))
    return replace(prompt, negative_prompt=", ".join(filter(None, told)) or prompt.negative_prompt, stages=())


def _phrases(text: str) -> list[str]:
    return [phrase for phrase in _PHRASE_STARTS.split(text) if phrase]
