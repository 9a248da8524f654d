"""Tests and benchmarks import a package's names from its face, so that a move inside it touches nothing outside."""

import ast
from collections.abc import Iterator

from tests.programs import ROOT

# Modules that are asked for names of their own, and why.
PAST_A_FACE = {
    "rlr_peft.build.folder_lock": "names of the lock's files",
    "rlr_peft.prompts.sampler": "a limit that the test has to exceed",
    "rlr_peft.rewards.combination": "a weight that the closed form needs",
    "rlr_peft.rewards.detector": "what one reward computes, against its authors' code",
    "rlr_peft.rewards.model_files": "which published files rewards are made of, against the files themselves",
    "rlr_peft.rewards.names": "which published files rewards are made of, against the files themselves",
    "rlr_peft.rewards.ocr": "what one reward computes, against its authors' code",
    "rlr_peft.rewards.video_rewards": "what one reward computes, against its authors' code",
    "rlr_peft.training.learning_rate": "numbers of the rule that the test works out by hand",
}
# Modules that are taken as a whole: tests shorten their waits and limits, benchmarks time their parts.
TAKEN_WHOLE = {
    "rlr_peft.build.chain",
    "rlr_peft.build.folder_lock",
    "rlr_peft.build.optimizer",
    "rlr_peft.chain.adjoint",  # `adjoint.run`, to tell it from other runs
    "rlr_peft.chain.families",
    "rlr_peft.prompts.language_models",
    "rlr_peft.publishing.hub_client",
    "rlr_peft.rewards.server",
    "rlr_peft.training.update",
}


def imported() -> Iterator[tuple[str, str, str]]:
    """File outside of `rlr_peft`, module of a package of it, and name taken from the module."""
    for folder in ("tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlr_peft."):
                    for name in node.names:
                        yield str(path.relative_to(ROOT)), node.module, name.name


def is_module(name: str) -> bool:
    """Whether a dotted name is that of a module inside a package, whose face could give what is in it."""
    path = ROOT.joinpath(*name.split("."))
    return name.count(".") >= 2 and path.with_suffix(".py").is_file()


def face_of(package: str) -> str:
    """The stub that lists what a package gives."""
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi")
    return stub.read_text(encoding="utf-8") if stub.is_file() else ""


def test_names_come_from_the_face_of_their_package() -> None:
    past = {(path, module) for path, module, _ in imported() if is_module(module)}
    assert {module for _, module in past} == set(PAST_A_FACE), (
        f"export the name from the package's __init__.pyi and import it from there: {sorted(past)}"
    )


def test_modules_are_taken_as_a_whole_only_to_change_what_is_in_them() -> None:
    whole = {
        f"{package}.{name}"
        for _, package, name in imported()
        if is_module(f"{package}.{name}") and f" as {name}\n" not in face_of(package)
    }
    assert whole == TAKEN_WHOLE


def test_no_private_name_is_imported() -> None:
    assert not {(path, name) for path, _, name in imported() if name.startswith("_")}
