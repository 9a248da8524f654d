"""The flags of every command: read as strictly as those of training, and refused with the same exit code."""

from pathlib import Path
from typing import Any

import pytest

from rlr_peft.cli import main
from rlr_peft.compare import CompareFlags
from rlr_peft.config import Group, read_words
from rlr_peft.diagnose import DiagnoseFlags
from rlr_peft.plan import PlanFlags
from rlr_peft.publishing import CardFlags, MergeFlags, PushFlags
from rlr_peft.serve_reward import ServeFlags


def read(flags: type[Group], *words: str, place: str | None = None) -> Any:
    return read_words(words, flags, "program", "", place=place).own


@pytest.mark.parametrize("text", ["1e3", "[a]", "yes", "0x10", "010", "null and void", "a: b", "~", "true", "-1"])
def test_a_text_arrives_as_it_is_written(text: str) -> None:
    assert read(ServeFlags, f"--reward={text}", f"--host={text}").host == text
    merge = read(MergeFlags, f"--base={text}", f"--adapter={text}", f"--output={text}", f"--variant={text}")
    assert (merge.base, merge.adapter, merge.output, merge.variant) == (text,) * 4
    assert read(PushFlags, "folder", f"--hub_model_id={text}", place="folder").hub_model_id == text
    assert read(CardFlags, f"--template={text}", "folder", place="folder").template == text
    assert read(CompareFlags, f"--adapter={text}", "--adapter", "b", "c").adapter == (text, "b", "c")


def test_what_stands_alone_may_have_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--base=b", "--output=o")
    for given in (["a", *words], [*words, "a"], ["--adapter", "a", *words]):
        assert read(MergeFlags, *given, place="adapter") == MergeFlags(adapter="a", output="o", base="b")
    for given in (["a", "b"], ["--adapter", "a", "b"], ["--adapter", "a", "--adapter=b"]):
        assert read(CompareFlags, *given, place="adapter").adapter == ("a", "b")
    for command, usage in (
        ("merge", "merge ADAPTER --output TEXT [--name"),
        ("compare", "compare ADAPTER [ADAPTER ...] [--config"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: rlr-peft {usage}" in " ".join(capsys.readouterr().out.split())


def test_several_may_be_one_list_as_in_yaml() -> None:
    for given in (["[a, b c]"], ["a", "b c"], ['["a", "b c"]']):
        assert read(CompareFlags, "--adapter", *given).adapter == ("a", "b c")


def test_null_and_nothing_are_the_default() -> None:
    assert read(PushFlags, "folder", "--hub_model_id", "null", place="folder") == PushFlags("folder")
    assert read(ServeFlags, "--reward", "x", "--reward_model_path", "{a: '1e3', b: c d}").reward_model_path == {
        "a": "1e3",
        "b": "c d",
    }


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("serve-reward --reward x --reward_model_path yes", "reward_model_path: expected a mapping of names to texts"),
        ("serve-reward --reward x --reward_model_path [a]", "reward_model_path: expected a mapping of names to texts"),
        ("serve-reward --reward x --reward_model_path {a:1,a:2}", "reward_model_path: "),
        (
            "serve-reward --reward x --reward_model_path {a:1e3}",
            "reward_model_path: expected a mapping of names to text",
        ),
        ("serve-reward --reward x --port 1e3", "port: expected a whole number, got 1e3"),
        ("serve-reward --reward x --port 1_000", "port: expected a whole number, got 1_000; write it in plain decimal"),
        ("serve-reward --reward x --max_megapixels nan", "max_megapixels: expected a number, got nan"),
        ("serve-reward --reward x --request_timeout 0", "request_timeout: expected above 0 and at most 86400, got 0"),
        (
            "serve-reward --reward x --device meta",
            "device: expected a device that is here, such as",
        ),
        (
            "serve-reward --reward x --device mps",
            "device: expected a device that is here, such as",
        ),
        ("serve-reward", "missing reward; give it as a flag (--reward VALUE)."),
        ("merge --base x", "missing adapter, output; give each as a flag"),
        ("merge --base x --adapter y --output z --dtype no", "dtype: expected fp32 or fp16 or bf16, got no"),
        ("card", "missing folder; give it as a flag (--folder VALUE); folder also as a word of its own."),
        ("merge --base x --adapter y z", "expected --name VALUE, got the stray z"),
        ("card FILE --template", "template: expected a text or null, got nothing; write --template VALUE"),
        ("card FILE --plain maybe", "plain: expected true or false, got maybe"),
        ("card FILE --plain --template FILE", "plain: expected no template and no extra_text with it, got one"),
        ("card FILE other", "folder: expected one, got "),
        ("push FILE --hub_private_repo yes", "hub_private_repo: expected true or false, got yes; write true or false."),
        ("push FILE --hub_modelid x", "command line: unknown name hub_modelid; did you mean hub_model_id?"),
        ("push --hub_private_repo FILE", "hub_private_repo: expected true or false, got "),
        ("push FILE --rank 3", "command line: unknown name rank; "),
        ("plan --gpu_memory inf", "gpu_memory: expected a number or null, got inf"),
        (
            "plan --gpu_memory 12.5GB",
            "gpu_memory: expected a number or null, got 12.5GB; write the number alone: 12.5 [GiB].",
        ),
        ("plan --samples 1", "command line: unknown name samples; "),
        ("plan sdxl", "expected --name VALUE, got the stray sdxl; write --config sdxl for the recipe."),
        ("plan help", "expected --name VALUE, got the stray help; write --help."),
        ("plan -rank 4", "expected --name VALUE, got the stray -rank 4; write --rank."),
        ("compare --adapter [a", "adapter: expected a folder, a .safetensors file or a Hub repository"),
        (
            "compare --adapter [a,{b:1}]",
            "adapter: expected one or more texts, got {'b:1': None}; write --adapter VALUE",
        ),
        (
            "diagnose --optimizer adamww",
            "optimizer: expected AdamW or Adafactor or Lion or Muon or Prodigy, got adamww; "
            "write --optimizer VALUE. Did you mean AdamW?",
        ),
        ("plan --output FOLDER", "output: expected a place to write to, got "),
        ("diagnose --output FOLDER/" + "x" * 255 + ".html", "output: expected a place to write to, got "),
        ("diagnose --output FOLDER/a.png", "output: expected a file that ends in .html, got "),
        ("compare --adapter x --images_per_prompt 1.5", "images_per_prompt: expected a whole number, got 1.5"),
        (
            "compare missing",
            "adapter: expected a folder, a .safetensors file or a Hub repository `user/name`, got missi",
        ),
        ("trian --config x", "command: expected train, config, plan, "),
        ("compare --adapter x --output FILE", "output: expected a place to write to, got "),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    required = ["--pretrained_model_name_or_path", "x/y", "--prompt_path", "tiny-shapes/train", "--reward_fn", "z"]
    words = command.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path)).split()
    with pytest.raises(SystemExit) as left:
        main(words + (required if words[0] in ("plan", "diagnose") else []))
    printed = capsys.readouterr()
    assert left.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "flags", [ServeFlags, CompareFlags, DiagnoseFlags, PlanFlags, CardFlags, MergeFlags, PushFlags]
)
def test_every_flag_has_a_sentence(flags: type[Group], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read(flags, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and f"{flags.__doc__}:" in printed and "None" not in printed
