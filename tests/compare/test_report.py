"""What a comparison leaves as data and text: win rates and differences by hand, files read back, findings."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from matplotlib.patches import Rectangle
from PIL import Image

from rlr_peft.compare import (
    Comparison,
    Model,
    chosen_pairs,
    console_text,
    draw_figures,
    markdown,
    notes,
    plain_numbers,
    score_columns,
    tables,
    unique_labels,
    write_page_and_scores,
    write_report,
    write_scores,
)
from rlr_peft.figures import inline_svg
from rlr_peft.reports import with_error, write_numbers
from tests.compare.comparisons import HELDOUT, TRAINED, comparison, evaluation, flat_images

BASE = {"reward": [0.1, 0.2, 0.3, 0.4], "heldout": [1.0, 2.0, 3.0, 4.0]}
BETTER = {"reward": [0.2, 0.3, 0.3, 0.3], "heldout": [2.0, 3.0, 4.5, 5.5]}
INFO = {"reward/color": [0.0, 0.5, 0.5, 1.0]}


def example() -> Comparison:
    prompts = ["a | cat", "a | cat", "dogs, “two”", "dogs, “two”"]
    features = torch.eye(4)
    base = evaluation(BASE, prompts=prompts, info=INFO, features=features)
    first = evaluation(BETTER, prompts=prompts, info=INFO, features=features, images=flat_images([0.9, 0.8, 0.7, 0.6]))
    second = evaluation(
        BASE, prompts=prompts, info=INFO, features=torch.ones(4, 4), images=flat_images([0.5] * 4, color=1)
    )
    return comparison(
        base, first, second, rewards=(TRAINED, HELDOUT), divergences=[torch.tensor([1.0, 3.0])], facts={"base": "tiny"}
    )


def test_differences_and_win_rates_are_those_worked_out_by_hand() -> None:
    rewards, variety = tables(example())
    rows = {(row[0], row[1]): row[2:] for row in rewards.rows}
    # differences .1 .1 of one prompt, 0 -.1 of the other: mean .025, sums of what is left .15 and -.15, so the error is
    # sqrt(2 / 1 * 2 * .15^2) / 4; two wins and a tie of four
    assert rows["judge", "first"] == ["0.275 ± 0.025", "+0.025 ± 0.075", "62.5%"]
    assert rows["judge", "base"][1:] == ["-", "-"]
    # differences 1 1, 1.5 1.5: sums of what is left -.5 and .5
    assert rows["other judge (held out)", "first"][1:] == ["+1.25 ± 0.25", "100.0%"]
    assert rows["judge", "second"][1:] == ["+0", "50.0%"]
    found = {row[1]: row[2:] for row in variety.rows}
    assert found["first"] == ["1", "+0", "1", "+0", "0", "2.0 ± 1.0"]
    assert found["second"][:4] == ["0", "-1", "0", "-1"] and found["second"][-1] == "-"


def test_one_image_a_prompt_has_no_column_for_the_variety_within() -> None:
    drawn = evaluation({"reward": [0.0, 1.0]}, features=torch.eye(2))
    _, variety = tables(comparison(drawn, drawn))
    assert list(variety.columns) == ["", "model", "all images", "change", "to the base's image"]
    assert [row[1:] for row in variety.rows] == [["base", "1", "-", "-"], ["first", "1", "+0", "0"]]
    assert "one prompt" not in variety.explanation


def test_scores_come_back_from_parquet_and_csv(tmp_path: Path) -> None:
    write_scores(tmp_path, example())
    columns = score_columns(example())
    assert list(columns) == ["model", "prompt", "seed", "judge", "other judge", "judge/color"]
    parquet = load_dataset(
        "parquet", data_files=str(tmp_path / "scores.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert parquet.to_dict() == columns
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == columns["prompt"]
    assert [int(row["seed"]) for row in rows] == [100, 101, 102, 103] * 3
    assert [float(row["judge"]) for row in rows] == pytest.approx(columns["judge"])


def test_images_are_named_where_they_are_kept() -> None:
    plain = example()
    files = [f"images/{index}.png" for index in range(4)]
    kept = Comparison(
        plain.rewards,
        *(Model("base", plain.base.evaluation, image_files=files), [Model("a", plain.base.evaluation, None, files)]),
    )
    assert score_columns(kept)["image"] == files * 2
    assert "image" not in score_columns(plain)


def test_numbers_are_json_without_gaps(tmp_path: Path) -> None:
    write_numbers(tmp_path / "compare.json", plain_numbers(example()))
    numbers = json.loads((tmp_path / "compare.json").read_text())
    first, second = numbers["adapters"]
    assert first["rewards"]["judge"]["gain"] == pytest.approx(0.025)
    assert first["rewards"]["judge"]["win_rate"] == 0.625
    assert first["attributes"]["judge"]["color"]["gain"] == 0
    assert first["kl"] == {"value": 2.0, "error": 1.0, "count": 2} and first["kl_samples"] == 2
    assert second["kl"] is None
    assert second["variety"]["overall_change"]["value"] == pytest.approx(-1)
    assert numbers["heldout"] == ["other judge"] and numbers["images"] == 4


def test_markdown_and_console_hold_every_row() -> None:
    text, plain = markdown(example()), console_text(example())
    for table in tables(example()):
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in text
            assert re.search(r"\s+".join(re.escape(cell) for cell in row if cell), plain)
    assert "- **base:** tiny" in text


def test_every_figure_has_a_file_and_a_drawing(tmp_path: Path) -> None:
    written = write_report(tmp_path, example())
    assert written[0] == tmp_path / "compare.html" and all(path.stat().st_size > 0 for path in written)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "attributes.png",
        "reward_kl.png",
        "rewards.png",
    ]
    for path in (tmp_path / "figures").iterdir():
        with Image.open(path) as picture:
            assert picture.width == 1000
    for name, figure in draw_figures(example()).items():
        svg = inline_svg(figure, name, f"the <figure> {name}")
        assert svg.startswith(f'<svg role="img" aria-label="the &lt;figure&gt; {name}"')
        assert "var(--ink)" in svg and "first" in svg and "http" not in re.sub(r'xmlns[:\w]*="[^"]*"', "", svg)


@pytest.mark.parametrize("outlier", [1e6, 0.0, -3e4])
def test_one_outlier_does_not_ask_for_billions_of_bins(outlier: float) -> None:
    scores = [1e-6 * index for index in range(63)]
    drawn = comparison(
        evaluation({"reward": [*scores, 0.0]}),
        evaluation({"reward": [*scores, outlier]}, images=flat_images([0.5] * 64, color=1)),
    )
    (axes, *_) = draw_figures(drawn)["rewards"].axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sum(bar.get_height() for bar in bars) == 2 * 64 and len(bars) <= 2 * 30


def test_a_run_folder_gets_the_page_and_the_scores_alone(tmp_path: Path) -> None:
    names = [path.name for path in write_page_and_scores(tmp_path, example())]
    assert names == ["compare.html", "scores.parquet", "scores.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def rising(start: float, step: float, count: int = 20) -> list[float]:
    """Scores with a little scatter that a paired difference does not have."""
    return [start + step + 0.01 * (index % 5) for index in range(count)]


def jittered(values: list[float]) -> list[float]:
    return [value + 1e-3 * (-1) ** index for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("reward", "heldout", "sentence"),
    [
        (0.2, 0.1, "judge rose, and so did other judge, held out"),
        (0.2, -0.1, "judge rose while other judge, held out, fell: the mark of reward hacking"),
        (0.2, 0.0, "judge rose; no held-out reward moved clearly"),
        (-0.2, 0.0, "judge fell"),
        (-0.2, -0.1, "judge and other judge fell"),
        (0.0, -0.1, "other judge fell"),
        (0.0, 0.1, "other judge rose, which is held out"),
        (0.0, 0.0, "no reward changed clearly, as every 95 % interval of a gain contains 0: judge -"),
    ],
)
def test_gains_are_put_into_words(reward: float, heldout: float, sentence: str) -> None:
    base = evaluation({"reward": rising(0, 0), "heldout": rising(0, 0)})
    drawn = evaluation(
        {"reward": jittered(rising(0, reward)), "heldout": jittered(rising(0, heldout))},
        images=flat_images([0.5] * 20, color=1),
    )
    (note,) = notes(comparison(base, drawn, rewards=(TRAINED, HELDOUT)))
    assert note.startswith(f"first: {sentence}")


def test_a_gain_without_held_out_reward_is_not_confirmed() -> None:
    base, drawn = (
        evaluation({"reward": rising(0, 0)}),
        evaluation({"reward": rising(0, 1)}, images=flat_images([1.0] * 20)),
    )
    assert notes(comparison(base, drawn)) == ["first: judge rose; no held-out reward was measured to confirm it."]


@pytest.mark.parametrize(
    ("left", "word"), [(0.05, "a collapse"), (0.7, "variety was lost, or mistakes were mended"), (0.99, None)]
)
def test_lost_variety_is_told(left: float, word: str | None) -> None:
    """Features of images of a prompt at right angles, all drawn together by the adapter."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 64, generator=generator)
    drawn_together = math.sqrt(left) * features + math.sqrt(1 - left) * torch.ones(64)
    prompts = [f"prompt {index // 4}" for index in range(40)]
    base = evaluation({"reward": [0.0] * 40}, prompts=prompts, features=features)
    drawn = evaluation(
        {"reward": [0.0] * 40}, prompts=prompts, features=drawn_together, images=flat_images([1.0] * 40, color=2)
    )
    found = [note for note in notes(comparison(base, drawn)) if "differ" in note]
    if word is None:
        assert not found
    else:
        assert len(found) == 2 and all(note.endswith(f"{word}.") for note in found)
        assert "images of one prompt differ" in found[0] and "all images differ" in found[1]


def test_an_adapter_without_effect_is_told() -> None:
    same = evaluation({"reward": [0.0, 1.0]})
    assert "draws exactly the base's images: it has no effect" in notes(comparison(same, same))[0]


def test_the_page_shows_the_worst_the_best_and_the_first() -> None:
    gains = [0.0] * 200
    gains[150], gains[151], gains[190] = -5.0, -4.0, 7.0
    many = comparison(evaluation({"reward": [0.0] * 200}), evaluation({"reward": gains}))
    chosen = chosen_pairs(many, most=12)
    assert len(chosen) == 12 and chosen == sorted(set(chosen))
    assert {0, 150, 151, 190} <= set(chosen)
    assert chosen_pairs(many, most=200) == list(range(200))


def test_comparisons_that_cannot_be_told_are_refused() -> None:
    drawn = evaluation({"reward": [0.0, 1.0]})
    with pytest.raises(ValueError, match="labels of their own"):
        Comparison([TRAINED], Model("base", drawn), [Model("base", drawn)])
    with pytest.raises(ValueError, match="one or more adapters"):
        Comparison([TRAINED], Model("base", drawn), [])
    with pytest.raises(ValueError, match=r"rewards of the evaluations \(reward\), got heldout"):
        Comparison([TRAINED, HELDOUT], Model("base", drawn), [Model("a", drawn)])
    with pytest.raises(ValueError, match="same prompts, seeds and rewards"):
        Comparison([TRAINED], Model("base", drawn), [Model("a", evaluation({"reward": [0.0, 1.0, 2.0]}))])


@pytest.mark.parametrize(
    ("value", "error", "sign", "text"),
    [
        (0.61349, 0.0123, False, "0.613 ± 0.012"),
        (12.3456, 1.7, True, "+12.3 ± 1.7"),
        (-1234.5, 210.0, False, "-1,234 ± 210"),
        (0.5, 0.0, True, "+0.5"),
        (0.5, math.nan, False, "0.5"),
        (1e-9, 1e-10, False, "1e-09 ± 1e-10"),
    ],
)
def test_numbers_have_two_digits_of_their_error(value: float, error: float, sign: bool, text: str) -> None:
    assert with_error(value, error, sign=sign) == text


def test_labels_are_short_and_different(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c/checkpoint-4"):
        (tmp_path / name).mkdir(parents=True)
    places = [str(tmp_path / name) for name in ("a/run", "b/run", "c/checkpoint-4")]
    assert unique_labels(places) == ["a/run", "b/run", "c/checkpoint-4"]
    assert unique_labels([*places[:1], "user/repo@v2"]) == ["run", "repo@v2"]
    assert unique_labels(["someone/base"]) == ["someone/base"]  # the base is called so
    with pytest.raises(ValueError, match="different adapters"):
        unique_labels([places[0], places[0]])
