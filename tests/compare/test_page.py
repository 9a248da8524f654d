"""The page in a real browser, from a file: no errors, no requests, slider, sorting, filter, choices, keyboard."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from rlr_peft.compare import Comparison, Model, write_page_and_scores
from rlr_peft.prompt import ConditionImage, Prompt
from tests.compare.comparisons import HELDOUT, TRAINED, comparison, evaluation, flat_images

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page cannot be opened")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")
PROMPTS = ["a red fox", "a blue boat & </script><b>bold</b>", "two foxes “in” snow", "a boat"]


def example() -> Comparison:
    """Gains of the first adapter: 0, -.2, +.3, +.1; of the second the other way round."""
    base = evaluation(
        {"reward": [0.5, 0.5, 0.5, 0.5], "heldout": [10.0, 20.0, 30.0, 40.0]},
        prompts=PROMPTS,
        images=flat_images([1.0] * 4),
        info={"reward/color": [0.1, 0.2, 0.3, 0.4]},
        features=torch.eye(4),
    )
    first = evaluation(
        {"reward": [0.5, 0.3, 0.8, 0.6], "heldout": [10.0, 21.0, 30.0, 36.0]},
        prompts=PROMPTS,
        images=flat_images([1.0] * 4, color=1),
        info={"reward/color": [0.2, 0.2, 0.3, 0.5]},
        features=torch.eye(4),
    )
    second = evaluation(
        {"reward": [0.5, 0.7, 0.2, 0.4], "heldout": [10.0, 20.0, 30.0, 40.0]},
        prompts=PROMPTS,
        images=flat_images([1.0] * 4, color=2),
        info={"reward/color": [0.2, 0.2, 0.3, 0.5]},
        features=torch.eye(4),
    )
    facts = {"base": "tiny <shapes>", "seed": "0"}
    kl = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])]
    return comparison(base, first, second, rewards=(TRAINED, HELDOUT), divergences=kl, facts=facts)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page_and_scores(tmp_path_factory.mktemp("page"), example())[0]


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Page]:
    yield from opened(browser, file)


def opened(browser: Browser, file: Path, **options: Any) -> Iterator[Page]:
    """The page in a window of its own; fails on anything that it complains about or asks the network for."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]


def shown(page: Page) -> list[str]:
    """Beginnings of the prompts of the cards to be seen, in their order."""
    return [text.strip()[:11] for text in page.locator(".card:visible .prompt").all_inner_texts()]


def test_it_opens_with_the_worst_cases_first(page: Page) -> None:
    assert page.title() == "first and second against the base tiny <shapes>"
    assert shown(page) == ["a blue boat", "a red fox", "a boat", "two foxes “"]
    expect(page.locator(".card .values").first).to_have_text("0.500 → 0.300")
    expect(page.locator(".card .gain").first).to_have_text("▼ \N{MINUS SIGN}0.200")
    assert "down" in (page.locator(".card .gain").first.get_attribute("class") or "")
    expect(page.locator("#count")).to_have_text("4 of 4")
    assert page.locator(".chart svg").count() == 3
    assert page.locator("script b, .prompt b").count() == 0, "a prompt is no markup"


def color_at(page: Page, share: float) -> tuple[int, ...]:
    """The colour of the first pair at this share of its width, a quarter down from its bottom: from a screenshot."""
    picture = Image.open(io.BytesIO(page.locator(".card:visible .pair").first.screenshot())).convert("RGB")
    pixel = picture.getpixel((int(picture.width * share), int(picture.height * 0.75)))
    assert isinstance(pixel, tuple)
    return pixel


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_the_slider_moves_the_line_between_base_and_adapter(page: Page) -> None:
    pair, slider = page.locator(".card .pair").first, page.locator(".card .split").first
    assert color_at(page, 0.3) == RED and color_at(page, 0.7) == GREEN
    box = pair.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up()
    assert 85 <= float(slider.input_value()) <= 95
    split = pair.locator(".after:visible").evaluate("image => getComputedStyle(image).clipPath")
    assert re.fullmatch(rf"inset\(0px 0px 0px {slider.input_value()}%\)", split)
    assert color_at(page, 0.7) == RED and color_at(page, 0.97) == GREEN
    assert page.locator(".card .split").nth(1).input_value() == "50", "the others stay"


def test_the_keyboard_moves_the_slider_and_says_so(page: Page) -> None:
    slider = page.locator(".card .split").first
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "53" and slider.get_attribute("aria-valuetext") == "53 % base"
    assert page.locator(".card .pair").first.evaluate("pair => getComputedStyle(pair).outlineStyle") == "solid"
    page.keyboard.press("Home")
    assert color_at(page, 0.05) == GREEN
    expect(slider).to_have_attribute("aria-label", re.compile("^Line between base and adapter, seed 101: a blue boat"))


def test_a_pair_is_shown_at_full_size(page: Page) -> None:
    full, button = page.locator("#full"), page.locator(".card .enlarge").first
    expect(button).to_have_accessible_name(re.compile("^Full size, seed 101: a blue boat"))
    button.click()
    expect(full.locator("figcaption")).to_have_text(["base, 0.500", "first, 0.300"])
    sources = [image.get_attribute("src") for image in full.locator("img").all()]
    assert sources == [page.locator(f".card .{side}").first.get_attribute("src") for side in ("before", "after")]
    page.keyboard.press("Escape")
    expect(full).to_be_hidden()


def test_all_sliders_move_at_once(page: Page) -> None:
    page.locator("#all").fill("80")
    assert {slider.input_value() for slider in page.locator(".card .split").all()} == {"80"}
    assert color_at(page, 0.7) == RED


@pytest.mark.parametrize(
    ("order", "first"),
    [("gain", "two foxes “"), ("loss", "a blue boat"), ("low", "a blue boat"), ("drawn", "a red fox")],
)
def test_sorting(page: Page, order: str, first: str) -> None:
    page.locator("#order").select_option("gain")
    page.locator("#order").select_option(order)
    assert shown(page)[0] == first


def test_sorting_by_gain_is_by_gain(page: Page) -> None:
    page.locator("#order").select_option("gain")
    assert shown(page) == ["two foxes “", "a boat", "a red fox", "a blue boat"]


def test_filtering_by_words(page: Page) -> None:
    page.locator("#filter").fill("FOX")
    assert shown(page) == ["a red fox", "two foxes “"]
    expect(page.locator("#count")).to_have_text("2 of 4")
    page.locator("#filter").fill("boat blue")
    assert shown(page) == ["a blue boat"]
    page.locator("#filter").fill("zebra")
    assert shown(page) == [] and page.locator("#none").is_visible()
    page.locator("#filter").fill("")
    assert len(shown(page)) == 4 and not page.locator("#none").is_visible()


def test_another_adapter_and_another_reward(page: Page) -> None:
    page.locator("#adapter").select_option(label="second")
    assert shown(page)[0] == "two foxes “"
    expect(page.locator(".tag.right").first).to_have_text("second")
    assert color_at(page, 0.7) == BLUE
    page.locator("#adapter").select_option(label="first")
    page.locator("#reward").select_option(label="other judge (held out)")
    assert shown(page) == ["a boat", "a red fox", "two foxes “", "a blue boat"]
    expect(page.locator(".card .gain").first).to_have_text("▼ \N{MINUS SIGN}4.00")


def test_side_by_side_shows_both_whole(page: Page) -> None:
    page.locator("#view").select_option("apart")
    assert color_at(page, 0.3) == RED and color_at(page, 0.7) == GREEN
    assert not page.locator(".split").first.is_visible() and not page.locator("#all").is_visible()
    before, after = (page.locator(f".card img.{side}:visible").first.bounding_box() for side in ("before", "after"))
    assert before is not None and after is not None
    assert after["x"] >= before["x"] + before["width"] and after["width"] == pytest.approx(before["width"], abs=1)


def test_dark_and_light_follow_the_reader(browser: Browser, file: Path) -> None:
    def brightness(scheme: str) -> tuple[int, int]:
        (found,) = [
            page.evaluate(
                """() => [document.body, document.querySelector(".chart svg text")].map((element, index) => {
                    const style = getComputedStyle(element);
                    return (index ? style.fill : style.backgroundColor).match(/\\d+/g).slice(0, 3)
                        .reduce((sum, part) => sum + Number(part), 0);
                })"""
            )
            for page in opened(browser, file, color_scheme=scheme)
        ]
        return found[0], found[1]

    (paper, ink), (dark_paper, dark_ink) = brightness("light"), brightness("dark")
    assert paper > 700 > 400 > ink and dark_paper < 150 < 400 < dark_ink


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Browser, file: Path) -> None:
    for page in opened(browser, file):
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_long_names_and_prompts_in_any_script_keep_their_place(browser: Browser, tmp_path: Path) -> None:
    """A long prompt scrolls in its own box, one from right to left is set so, dollar signs make no formula."""
    prompts = ["a very long prompt " * 150, "W" * 400, "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 (test) 3!"]
    base = evaluation({"reward": [0.5] * 3}, prompts=prompts)
    drawn = evaluation({"reward": [0.4, 0.6, 0.7]}, prompts=prompts, images=flat_images([0.2] * 3, color=1))
    names = ["run$1_2$", "a-very-long-name-of-a-run-with-many-words-in-it-and-no-end"]
    made = Comparison([TRAINED], Model("base", base), [Model(name, drawn, torch.ones(2)) for name in names])
    (path, *_) = write_page_and_scores(tmp_path, made)
    for page in opened(browser, path):
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = [prompt.bounding_box() for prompt in page.locator(".prompt").all()]
        assert all(box is not None and box["height"] < 160 for box in boxes)
        directions = page.evaluate(
            "[...document.querySelectorAll('.prompt')].map((prompt) => getComputedStyle(prompt).direction)"
        )
        assert directions == ["ltr", "ltr", "rtl"]
        assert "run$1_2$" in (page.locator(".chart svg").first.text_content() or "")


def test_without_scripts_the_worst_cases_come_first_too(browser: Browser, file: Path) -> None:
    for page in opened(browser, file, java_script_enabled=False):
        assert shown(page) == ["a blue boat", "a red fox", "a boat", "two foxes “"]


def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("select, input, img, svg, [role=region]")].filter((element) =>
            !(element.labels && element.labels.length) && !element.getAttribute("aria-label") && !element.alt)
            .map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    assert [heading.inner_text() for heading in page.locator("h1, h2").all()][1:] == [
        "At a glance",
        "Images, side by side",
        "Figures",
        "What was compared",
    ]


def test_videos_are_strips_below_each_other(browser: Browser, tmp_path: Path) -> None:
    videos = torch.rand(2, 6, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    base, drawn = (evaluation({"reward": scores}, images=videos) for scores in ([0.0, 1.0], [1.0, 0.5]))
    (path, *_) = write_page_and_scores(tmp_path, comparison(base, drawn))
    for page in opened(browser, path):
        assert page.locator(".split, #all, #view").count() == 0
        before, after = (page.locator(f".card img.{side}").first.bounding_box() for side in ("before", "after"))
        assert before is not None and after is not None
        assert after["y"] >= before["y"] + before["height"]
        assert before["width"] / before["height"] == pytest.approx(4 * 20 / 16, rel=0.02)  # four frames
        assert page.locator("h2").nth(1).inner_text() == "Videos, side by side"


def test_the_picture_that_a_pair_was_drawn_from_stands_above_it(browser: Browser, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (48, 24), "blue").save(file, "PNG")
    prompts = [Prompt("make it green", image=ConditionImage(data=file.getvalue())), "a boat"]
    base = evaluation({"reward": [0.0, 1.0]}, prompts=prompts)
    drawn = evaluation({"reward": [1.0, 0.5]}, prompts=prompts, images=flat_images([0.3, 0.4]))
    (path, *_) = write_page_and_scores(tmp_path, comparison(base, drawn))
    for page in opened(browser, path):
        card = page.locator(".card", has_text="make it green")
        given, pair = (card.locator(part) for part in (".condition img", ".pair"))
        expect(given).to_have_attribute("alt", "drawn from this picture: make it green")
        above, below = given.bounding_box(), pair.bounding_box()
        assert above is not None and below is not None and above["y"] + above["height"] <= below["y"]
        shot = Image.open(io.BytesIO(given.screenshot())).convert("RGB")
        assert shot.getpixel((shot.width // 2, shot.height // 2)) == BLUE
        assert page.locator(".condition").count() == 1


def test_one_adapter_and_one_reward_leave_nothing_to_choose(browser: Browser, tmp_path: Path) -> None:
    base, drawn = evaluation({"reward": [0.0, 1.0]}), evaluation({"reward": [1.0, 0.5]}, images=flat_images([0.3, 0.4]))
    (path, *_) = write_page_and_scores(tmp_path, comparison(base, drawn))
    for page in opened(browser, path):
        assert page.locator("#adapter, #reward").count() == 0
        assert page.locator(".card .gain").first.inner_text() == "▼ \N{MINUS SIGN}0.500"
