"""What others wrote never moves a cursor, hides a word or turns letters around: on a terminal, in a log, on a page."""

import ast
import io
import json
import logging
import re
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tqdm.auto import tqdm

from rlr_peft.compare import draw_figures, markdown, page
from rlr_peft.config import yaml_text
from rlr_peft.foreign_text import MessageHandler, in_cell, in_code, in_text, printable, say
from rlr_peft.rewards import info_of
from tests.compare.comparisons import comparison, evaluation
from tests.programs import completed

ROOT = Path(__file__).parents[1]
# A title for the terminal, red, "safe" written over what stands there, reversed, isolated, unseen, half a pair.
HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2J\rsafe\x08\x7f \u202egnp.exe\u2066\u200b\u00ad\ufeff\u2028\U000e0041\udc80"
SHOWN = r"\x1b]0;owned\x07\x1b[31m\x9b2J\rsafe\x08\x7f \u202egnp.exe\u2066\u200b\xad\ufeff\u2028\U000e0041\udc80"
HARMLESS = "a café, שלום, می\u200cخور, 👩\u200d🎨 \N{NO-BREAK SPACE}\ttab\nline"


def is_clean(text: str) -> bool:
    unseen = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return all(unicodedata.category(mark) not in unseen or mark in "\t\n\u200c\u200d" for mark in text)


def test_it_is_written_out_as_python_does_and_harmless_texts_stay() -> None:
    assert printable(HOSTILE) == SHOWN and is_clean(SHOWN) and not is_clean(HOSTILE)
    assert printable(HARMLESS) == HARMLESS
    assert printable("line\r\nline") == "line\nline"


@given(st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp", "Lu", "Po"]), max_size=20))
def test_in_a_yaml_file_it_means_the_same(text: str) -> None:
    shown = yaml_text({"text": text, "texts": [text]})
    assert is_clean(shown)
    assert yaml.safe_load(shown) == {"text": text, "texts": [text]}


def test_in_markdown() -> None:
    for shown in (in_cell(HOSTILE), in_code(HOSTILE), in_text(HOSTILE)):
        assert is_clean(shown) and "\n" not in shown
    assert in_text("<img src=x> [a](b) *b*") == "&#60;img src=x> &#91;a](b) *b*"


PROGRAM = """
import logging, sys, warnings
from rlr_peft.foreign_text import guard_terminal, say
from rlr_peft.build.reporting import set_up_logging
from rlr_peft.build.reporting import reporting_errors
from rlr_peft.rewards.scores import RewardError

guard_terminal()
set_up_logging()
foreign = {foreign!r}
say(foreign)
logging.getLogger("rlr_peft.x").warning("said %s", foreign)
logging.getLogger("diffusers.x").error(foreign)
warnings.warn(foreign)
try:
    raise ValueError(foreign)
except ValueError as error:
    logging.getLogger("x").exception("failed")
    cause = error
try:
    with reporting_errors():
        raise RewardError(foreign, cause)
except SystemExit:
    pass
raise RuntimeError(foreign)
"""


def test_nothing_of_it_reaches_a_terminal() -> None:
    """Prints, messages of our and other loggers, warnings, explained errors and tracebacks of a real process."""
    done = completed(["-c", PROGRAM.format(foreign=HOSTILE)])
    out, err = done.stdout, done.stderr
    assert done.returncode == 1 and out == SHOWN + "\n"
    assert is_clean(out) and is_clean(err)
    assert f"said {SHOWN}\n" in err and f"UserWarning: {SHOWN}\n" in err and f"error: {SHOWN}\n" in err
    assert err.count(f"ValueError: {SHOWN}\n") == 2 and err.endswith(f"RuntimeError: {SHOWN}\n")


def test_programs_print_by_say_alone() -> None:
    files = [*(ROOT / "rlr_peft").rglob("*.py"), ROOT / "train_rlr_lora.py"]
    printing = [
        file.relative_to(ROOT).as_posix()
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    # The embedded pipeline is built from drawings of its own.
    assert [file for file in printing if "/tiny_shapes/" not in file] == ["rlr_peft/foreign_text.py"]


def test_a_comparison_shows_it_written_out() -> None:
    """Prompts, the numbers' names that a server gives, and what is compared."""
    ((name, numbers),) = info_of((torch.zeros(2), {HOSTILE: [1.0, 2.0]}), 2).items()
    drawn = comparison(
        evaluation({"reward": [0.1, 0.2]}, prompts=[HOSTILE, "b"], info={f"reward/{name}": numbers.tolist()}),
        evaluation({"reward": [0.3, 0.5]}, prompts=[HOSTILE, "b"], info={f"reward/{name}": [1.5, 2.0]}),
        facts={"base": HOSTILE},
    )
    html, text = page(drawn, draw_figures(drawn)), markdown(drawn)
    assert is_clean(html) and is_clean(text)
    assert html.count(r"\x1b]0;owned") >= 5 and r"**base:** \x1b]0;owned\x07\x1b&#91;31m" in text
    found = re.search('<script type="application/json" id="data">(.*?)</script>', html)
    assert found and json.loads(found[1])["pairs"][0]["prompt"] == SHOWN


@pytest.mark.parametrize("command", ["card", "push"])
def test_commands_show_it_written_out(command: str, tmp_path: Path) -> None:
    """The name of a folder, which is refused."""
    folder = tmp_path / "\x1b[31m\u202e"
    folder.mkdir()
    done = completed(["-m", "rlr_peft", command, folder])
    assert done.returncode == 2 and is_clean(done.stderr)
    assert done.stderr.startswith("error: ") and r"\x1b[3" in done.stderr


def test_nothing_is_printed_into_a_bar() -> None:
    """Of every line of a terminal what is left after its last return is seen."""
    terminal = io.StringIO()
    with tqdm(desc="Steps", total=3, file=terminal, mininterval=0) as bar:
        bar.update()
        say("said", terminal)
        MessageHandler(terminal).emit(logging.makeLogRecord({"msg": "logged"}))
        bar.update()
    seen = [line.split("\r")[-1] for line in terminal.getvalue().split("\n")]
    assert seen[:2] == ["said", "logged"]
    assert seen[2].startswith("Steps:  67%")
