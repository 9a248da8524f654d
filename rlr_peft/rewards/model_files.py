"""Which files the rewards with a network need, and where they are: known without torch, so that a missing one is told
before anything is loaded.

Every file has an address, repository and name. A user may put a local folder (or file, or another repository) in the
place of a repository, with the same file names inside. A model that was trained to answer one long question wants it
letter by letter: it is read out of its authors' own file, which is parsed and never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from rlr_peft.config.reward import VLM_PREFIX, model_in
from rlr_peft.errors import RewardError

GITHUB = "github:"  # of repositories that are not on the Hub: `github:owner/name`
SNAPSHOT = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class Part:
    """What a reward needs of one repository.

    Attributes:
        repo: on the Hub, or `github:owner/name`.
        files: their names; a tuple is of alternatives, the preferred first, and the last one is certain to be there. No
            names at all stand for a whole model of `transformers`.
    """

    repo: str
    files: tuple[str | tuple[str, ...], ...] = ()


MODEL_FILES = ("config.json", ("model.safetensors", "pytorch_model.bin"))
CLIP_WORDS = ("vocab.json", "merges.txt")
OPENAI_CLIP = "openai/clip-vit-large-patch14"
LAION_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2 = "xswu/HPSv2"
AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor"
# The same weights are spread under two names.
AESTHETIC_HEADS = ("aesthetic-model.safetensors", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
SIGLIP = "google/siglip-so400m-patch14-384"
AESTHETIC_V2_5_HEAD = f"{GITHUB}discus0434/aesthetic-predictor-v2-5"
IMAGE_REWARD = "zai-org/ImageReward"
BERT = "google-bert/bert-base-uncased"
DINO = "facebook/dino-vitb16"
OWLV2 = "google/owlv2-base-patch16-ensemble"
OWLV2_FILES = (*MODEL_FILES, "preprocessor_config.json", *CLIP_WORDS, "tokenizer_config.json")
HPSV3 = "MizzenAI/HPSv3"
HPSV3_CODE = f"{GITHUB}MizzenAI/HPSv3"
QWEN2_VL = "Qwen/Qwen2-VL-7B-Instruct"
# The chat template has its own file or is in the last of these.
QWEN2_VL_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
QWEN2_VL_2B = "Qwen/Qwen2-VL-2B-Instruct"
VIDEO_REWARD = "KwaiVGI/VideoReward"
VIDEO_REWARD_CODE = f"{GITHUB}KwaiVGI/VideoAlign"
UNIFIED_REWARD = "CodeGoat24/UnifiedReward-2.0-qwen-7b"
UNIFIED_REWARD_CODE = f"{GITHUB}CodeGoat24/UnifiedReward"
UNIFIED_QUESTION = Part(
    UNIFIED_REWARD_CODE, ("inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py",)
)

PARTS = {
    "aesthetic": (Part(OPENAI_CLIP, MODEL_FILES), Part(AESTHETIC_HEAD, (AESTHETIC_HEADS,))),
    "aesthetic-v2.5": (
        Part(SIGLIP, MODEL_FILES),
        Part(AESTHETIC_V2_5_HEAD, ("models/aesthetic_predictor_v2_5.pth",)),
    ),
    "clipscore": (Part(OPENAI_CLIP, (*MODEL_FILES, *CLIP_WORDS)),),
    "detector": (Part(OWLV2, OWLV2_FILES), Part(OPENAI_CLIP, (*MODEL_FILES, *CLIP_WORDS))),
    **{
        name: (Part(HPSV2, ((f"{file}.safetensors", f"{file}.pt"),)), Part(LAION_CLIP, CLIP_WORDS))
        for name, file in {
            "hpsv2": "HPS_v2.1_compressed",
            "hpsv2/v2.0": "HPS_v2_compressed",
            "hpsv2/v2.1": "HPS_v2.1_compressed",
        }.items()
    },
    "hpsv3": (
        Part(QWEN2_VL, QWEN2_VL_FILES),
        Part(HPSV3, ("HPSv3.safetensors",)),
        Part(HPSV3_CODE, ("hpsv3/dataset/data_collator_qwen.py",)),
    ),
    "imagereward": (Part(IMAGE_REWARD, (("ImageReward.safetensors", "ImageReward.pt"),)), Part(BERT, ("vocab.txt",))),
    "pickscore": (Part(PICKSCORE, MODEL_FILES), Part(LAION_CLIP, CLIP_WORDS)),
    "subject-consistency": (Part(DINO, MODEL_FILES),),
    "unifiedreward": (UNIFIED_QUESTION, Part(UNIFIED_REWARD)),
    "videoreward": (
        Part(QWEN2_VL_2B, QWEN2_VL_FILES),
        Part(VIDEO_REWARD, ("model_config.json", "checkpoint-11352/model.pth")),
        Part(VIDEO_REWARD_CODE, ("prompt_template.py",)),
    ),
}
"""By the reward's name."""

_IN_WORDS = {
    GatedRepoError: "is gated: accept its terms on https://huggingface.co/{repo} and log in with `hf auth login`",
    RepositoryNotFoundError: "was not found, or is private: check the name, or log in with `hf auth login`",
    LocalEntryNotFoundError: "is not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set",
    EntryNotFoundError: "has no such file",
}


class ModelFiles:
    """Finds the files of Hub repositories.

    Args:
        replacements: repository -> local folder, local file or another repository to use in its place.
        cache_dir: folder of the Hub's cache; None for the default one.
    """

    def __init__(self, replacements: Mapping[str, str] | None = None, cache_dir: str | None = None) -> None:
        self._replacements = dict(replacements or {})
        self._cache_dir = cache_dir
        self._found: set[Path] = set()

    def identity(self) -> list[Any]:
        """Of all files that were found, in plain values: the Hub's cache names a file after its contents; of others the
        size and the time of change count too."""
        files = [(path, path.resolve(), path.stat()) for path in sorted(self._found)]
        return [[path.name, place.name, stat.st_size, stat.st_mtime_ns] for path, place, stat in files]

    def find(self, reward_name: str, repo: str, *alternatives: str, beside: Sequence[str] = ()) -> Path:
        """One file: the first of the alternatives that there is.

        Args:
            reward_name: named in the error.
            alternatives: file names, the preferred first; the last one is certain to be in the repository.
            beside: what else is needed of the repository, for the command in the error.

        Raises:
            RewardError: missing, gated or unreachable; it names reward, repository, file and the command to get it.
        """
        place = self._replacements.get(repo, repo)
        names = " ".join(beside or alternatives[-1:])
        path = Path(place).expanduser()
        if path.is_file():
            return self._note(path)
        if path.is_dir():
            for name in alternatives:
                if (path / name).is_file():
                    return self._note(path / name)
            raise RewardError(
                f"reward '{reward_name}': expected {' or '.join(alternatives)} in {path}, which stands for {repo}; "
                f"get it with `hf download {repo} {names} --local-dir {path}`"
            )
        if place.startswith(GITHUB):
            code = place.removeprefix(GITHUB)
            raise RewardError(
                f"reward '{reward_name}' needs the file {alternatives[-1]} of github.com/{code}, which is not on the "
                f"Hub. Get it with `curl -LO https://github.com/{code}/raw/main/{alternatives[-1]}`, and name it with "
                f"--reward_model_path '{{{repo}: /path/to/{Path(alternatives[-1]).name}}}'"
            )
        if place != repo:
            _check_hub_id(reward_name, f"a folder, a file or a Hub id in the place of {repo}", place)
        problem: Exception | None = None
        for name in alternatives:
            found = self._download(place, name)
            if isinstance(found, Path):
                return self._note(found)
            problem = found
            if not isinstance(problem, EntryNotFoundError):
                break
        raise RewardError(
            f"reward '{reward_name}' needs the file {alternatives[-1]} of the Hub repository {place}, which "
            f"{_in_words(problem, place)}. Get it with `hf download {place} {names}`, or name a local copy with "
            f"--reward_model_path '{{{repo}: /path/to/folder}}' ({type(problem).__name__})"
        )

    def snapshot(self, reward_name: str, repo: str) -> Path:
        """The folder of a whole model of `transformers`: its weights as safetensors, which may be many, and all texts.

        Args:
            reward_name: named in the error.
            repo: the repository, or a local folder.

        Raises:
            RewardError: as `find`.
        """
        place = self._replacements.get(repo, repo)
        folder = Path(place).expanduser()
        if not folder.is_dir():
            _check_hub_id(reward_name, "a folder or a Hub id", place)
            try:
                folder = Path(snapshot_download(place, cache_dir=self._cache_dir, allow_patterns=SNAPSHOT))
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                raise RewardError(
                    f"reward '{reward_name}' needs the Hub repository {place}, which {_in_words(error, place)}. Get it "
                    f"with `hf download {place}`, or name a local copy with --reward_model_path "
                    f"'{{{repo}: /path/to/folder}}' ({type(error).__name__})"
                ) from None
        for file in folder.iterdir():
            if file.is_file():
                self._note(file)
        return folder

    def place(self, reward_name: str, part: Part) -> Path:
        """Where a part is: its file if it has only one, else the folder that holds its files.

        Raises:
            RewardError: as `find`.
        """
        if not part.files:
            return self.snapshot(reward_name, part.repo)
        wanted = [(file,) if isinstance(file, str) else file for file in part.files]
        if len(wanted) == 1:
            return self.find(reward_name, part.repo, *wanted[0])
        beside = [alternatives[0] for alternatives in wanted]
        found = [self.find(reward_name, part.repo, *names, beside=beside) for names in wanted]
        return found[0].parent

    def of(self, reward_name: str) -> list[Path]:
        """The places of the parts of a registered reward, in the order of `PARTS`.

        Raises:
            RewardError: as `find`.
        """
        return [self.place(reward_name, part) for part in PARTS[reward_name]]

    def refuse_missing(self, spec: str, endpoint: str | None) -> None:
        """Looks for all files of a reward by name, whether it is loaded here or not at all.

        Args:
            spec: as for `load_reward`; of people's own rewards nothing is known.
            endpoint: behind which a vision-language model is, in place of being loaded.

        Raises:
            RewardError: as `find`.
        """
        model = model_in(spec)
        if model is not None and (endpoint is None or not spec.startswith(VLM_PREFIX)):
            self.snapshot(spec, model)
        elif spec in PARTS and not (spec == "unifiedreward" and endpoint is not None):
            self.of(spec)

    def _note(self, path: Path) -> Path:
        self._found.add(path)
        return path

    def _download(self, place: str, name: str) -> Path | Exception:
        try:
            return Path(hf_hub_download(place, name, cache_dir=self._cache_dir))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            return error


def _check_hub_id(reward_name: str, expected: str, place: str) -> None:
    if place.startswith(("/", ".", "~")) or place.count("/") != 1:
        raise RewardError(
            f"reward '{reward_name}': expected {expected}, got {place}, which does not exist (looked for it from "
            f"{Path.cwd()})"
        )


def _in_words(problem: Exception | None, place: str) -> str:
    reason = "cannot be read: " + next(iter(str(problem).splitlines()), "")
    return next((text.format(repo=place) for kind, text in _IN_WORDS.items() if isinstance(problem, kind)), reason)


def constant_in(reward_name: str, path: Path, name: str) -> str:
    """The text that a module assigns to a name.

    Raises:
        RewardError: it assigns none.
    """
    for node in _nodes(reward_name, path):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=str(text))) if target == name:
                return text
    raise _is_another(reward_name, path, f"a text called {name}")


def template_in(reward_name: str, path: Path, variable: str) -> str:
    """The longest f-string of a module in which a variable stands, with `{prompt}` in the variable's place.

    Raises:
        RewardError: there is none.
    """
    found = [text for node in _nodes(reward_name, path) if (text := _template(node, variable)) is not None]
    if not found:
        raise _is_another(reward_name, path, f"an f-string with {{{variable}}}")
    return max(found, key=len)


def _template(node: ast.AST, variable: str) -> str | None:
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) and part.value.id == variable:
            parts.append("{prompt}")
        else:
            return None
    return "".join(parts) if "{prompt}" in parts else None


def _nodes(reward_name: str, path: Path) -> Iterator[ast.AST]:
    try:
        return ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, ValueError):
        raise _is_another(reward_name, path, "Python code") from None


def _is_another(reward_name: str, path: Path, expected: str) -> RewardError:
    return RewardError(f"reward '{reward_name}': expected {expected} in {path}; it is another file: get it again")
