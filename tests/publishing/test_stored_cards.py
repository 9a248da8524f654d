"""A card is written again from its record, which may be damaged, or come with somebody else's adapter."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from time import sleep

import pytest

from rlr_peft.cli import main
from rlr_peft.publishing import StoredCard, TemplateError, addressed_card, load_stored_card, write_card
from tests.publishing.records import FULL, write
from tests.publishing.test_card import check_sections

INSIDE = "expected the name of a file in its folder, got"


def test_extra_text_and_a_template_that_cannot_be_rendered(folder: Path) -> None:
    text = write(folder, FULL, extra_text="## Mine\n\nHand-written.\n")
    check_sections(text)
    assert "\n\n## Mine\n\nHand-written.\n\n## Use it\n" in text
    for template, message in (
        ("{{ card_data }} {% if %}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("---\ntags: [\n---\n", "cannot be rendered"),
        ("{{ card_data }} {{ titel }}", "names what is not there: titel. Did you mean title"),
        (
            "{{ card_data }} {{ qqqq }}",
            "names what is not there: qqqq. Its variables are adapter, base, base_text",
        ),
    ):
        with pytest.raises(TemplateError, match=message):
            write(folder, FULL, template)


@pytest.mark.parametrize(
    "reach",
    [
        "{{ title.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch HERE/reached') }}",
        "{{ lipsum.__globals__['os'].popen('touch HERE/reached').read() }}",
        "{% include 'README.md' %}",
        "{{ pairs.clear() }}",
    ],
)
def test_a_template_that_came_with_a_run_reaches_no_python(
    folder: Path, reach: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(folder, StoredCard(FULL))
    stored = json.loads((folder / "run_record.json").read_text())
    stored["template"] = "---\n{{ card_data }}\n---\n" + reach.replace("HERE", str(tmp_path))
    (folder / "run_record.json").write_text(json.dumps(stored))
    before = (folder / "README.md").read_bytes()
    with pytest.raises(SystemExit) as left:
        main(["card", str(folder)])
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("error: The template of the card cannot be rendered (")
    assert (folder / "README.md").read_bytes() == before and not (tmp_path / "reached").exists()


@pytest.mark.parametrize(
    ("waste", "why"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(200) %}{% endfor %}{% endfor %}",
            "takes more than 0.2 s of work",
        ),
        ("{{ 10 ** 10 ** 10 }}", "a template's ** of such numbers may take too long"),
        ("{% set n = namespace(x=10) %}{% for i in range(50) %}{% set n.x = n.x * n.x %}{% endfor %}", "'s * of such"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_came_with_a_run_takes_no_time(
    folder: Path, waste: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlr_peft.publishing.card.RENDERING_SECONDS", 0.2)
    with pytest.raises(TemplateError, match=f"cannot be rendered .*{re.escape(why)}"):
        write(folder, FULL, f"---\n{{{{ card_data }}}}\n---\n{waste}")


def test_a_template_that_waits_for_a_busy_machine_is_rendered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlr_peft.publishing.card.RENDERING_SECONDS", 0.2)
    monkeypatch.setattr("rlr_peft.publishing.card.FILTERS", {"waits": lambda text: sleep(0.4) or text})
    write(folder, FULL, "---\n{{ card_data }}\n---\n{{ 'its turn came' | waits }}")
    assert "its turn came" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"dtype": "float32)\nimport evil  #"}}, "expected a name of Python, got 'float32)"),
        ({"sampling": {"call": {"x=1)\nimport evil\n(y": 1}}}, "expected a name of Python, got 'x=1)"),
        ({"sampling": {"scheduler": "X)\nimport evil\n(Y"}}, "expected a name of Python, got 'X)"),
        ({"adapter": {"denoisers": ["unet\nimport evil"]}}, "expected a name of Python, got 'unet"),
        (
            {"images": {"before_after": "../../secret.png"}},
            f"{INSIDE} '../../secret.png'",
        ),
        (
            {"images": {"gallery": [["/etc/hostname", "a cat"]]}},
            f"{INSIDE} '/etc/hostname'",
        ),
        ({"metrics": {"reward_gain": "[x](y)"}}, "expected another type of it.record.metrics.reward_gain, got"),
        ({"sampling": {"fps": "8)\nimport evil"}}, "expected another type of it.record.sampling.fps, got '8)"),
        ({"prompts": {"shown": 5}}, "expected another type of it.record.prompts.shown, got 5"),
        ({"base": {"model": None}}, "expected another type of it.record.base.model, got None"),
        ({"images": {"gallery": [["a.png"]]}}, "expected another type of it.record.images.gallery, got ['a.png']"),
        ({"rewards": {"weights": {"a": "1"}}}, "expected another type of it.record.rewards.weights.a, got '1'"),
        ({"base": {"nothing": 1}}, "unexpected keyword argument 'nothing'"),
    ],
)
def test_a_record_that_came_with_an_adapter_puts_no_code_into_the_card(
    folder: Path, changes: dict[str, dict[str, object]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(folder, StoredCard(FULL))
    stored = json.loads((folder / "run_record.json").read_text())
    for group, values in changes.items():
        stored["record"][group] |= values
    (folder / "run_record.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit) as left:
        main(["card", str(folder)])
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_a_card_is_written_again_from_its_records(folder: Path) -> None:
    first = write_card(folder, StoredCard(FULL)).read_bytes()
    plain = [json.loads(json.dumps(asdict(record))) for record in (load_stored_card(folder).record, FULL)]
    assert plain[0] == plain[1]
    (folder / "README.md").unlink()
    (folder / "extra.md").write_text("Hand-written.")
    (folder / "mine.md").write_text("---\n{{ card_data }}\n---\n\n# {{ title }}\n\n{{ extra_text }}\n")
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_bytes() == first
    title = "# tiny-shapes LoRA for tiny-shapes"
    words = ["--template", str(folder / "mine.md"), "--extra_text", str(folder / "extra.md")]
    assert main(["card", str(folder), *words]) == 0
    assert (folder / "README.md").read_text().endswith(f"{title}\n\nHand-written.\n")
    # Both are remembered, also when the card is addressed to a repository; and can be forgotten.
    addressed = addressed_card(folder, "owner/name")
    assert addressed is not None and write_card(folder, addressed).read_text().endswith("Hand-written.\n")
    (folder / "empty.md").write_text(" \n")
    with pytest.raises(SystemExit) as left:
        main(["card", str(folder), "--template", str(folder / "empty.md")])
    assert left.value.code == 2 and (folder / "README.md").read_text().endswith("Hand-written.\n")
    assert main(["card", str(folder), "--plain"]) == 0
    assert 'load_lora_weights("owner/name"' in (folder / "README.md").read_text()


def test_a_card_that_was_edited_is_kept_beside_the_new_one(folder: Path) -> None:
    path = write_card(folder, StoredCard(FULL))
    assert main(["card", str(folder)]) == 0 and not (folder / "README.edited.md").exists()
    path.write_text("# by hand\n")
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.edited.md").read_text() == "# by hand\n"
    assert path.read_text().startswith("---\n")


NESTED = '{"a": ' * 30 + "1" + "}" * 30


@pytest.mark.parametrize(
    "damage",
    [
        *(
            None,
            "",
            "{",
            "[]",
            "null",
            "1" * 5000,
            '{"record": {"base_model": "x"}}',
            '{"version": 2, "record": {"x": 1}}',
        ),
        *('{"a": ' * 5000, NESTED, f'{{"version": 2, "record": {NESTED}}}', "\0"),
    ],
)
def test_a_folder_without_records_is_refused(
    tmp_path: Path, damage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage is not None:
        (tmp_path / "run_record.json").write_text(damage)
    with pytest.raises(SystemExit) as left:
        main(["card", str(tmp_path)])
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
