"""The page of a run's progress: what it shows, in a browser too, and that training does not need it."""

import logging
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from rlr_peft.training import METRICS_LOG, PROGRESS_PAGE, Progress, ProgressPage, read_metrics, thinned
from tests.training.runs import build, config_file, train_here

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPTS = ["red ball", "</script><b>bold</b>"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page cannot be opened")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_resumed_run_in_a_browser(page_of_a_run: Path, width: int) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.goto(page_of_a_run.as_uri())
        expect(page.locator(".now")).to_contain_text("Update 3 of 3, about")
        expect(page.locator(".now")).to_contain_text("of which 50 s for the final evaluation. All updates are done")
        titles = page.locator(".panel h3").all_inner_texts()
        assert titles == [
            *("rewards.py:redness, training prompts", "jpeg-compressibility, held out", "KL from the base, nats")
        ]
        assert page.evaluate("JSON.parse(document.getElementById('data').textContent).curves[0].points.length") == 3
        assert [panel.locator("path").count() for panel in page.locator(".panel").all()] == [3, 3, 2], "KL has no band"
        numbers = re.fullmatch(
            r"update 3: -?\d+\.?(\d*) \u00b1 \d+\.?(\d*), running mean -?\d+\.?(\d*)",
            page.locator(".panel output").first.inner_text(),
        )
        assert numbers is not None and len({len(decimals) for decimals in numbers.groups()}) == 1
        assert page.locator(".prompt").all_inner_texts() == PROMPTS and page.locator(".card b").count() == 0
        first = page.locator(".shown").first
        expect(first).to_have_attribute("src", "validation/step-000003/000.png")
        assert first.evaluate("image => image.naturalWidth") > 0
        page.locator("#frame").fill("0")
        expect(first).to_have_attribute("src", "validation/step-000000/000.png")
        expect(page.locator("#when")).to_have_text("the base, before training")
        page.reload()
        expect(first).to_have_attribute("src", "validation/step-000000/000.png")
        page.locator(".strip").last.locator("button").nth(1).click()
        expect(page.locator("#when")).to_have_text("after update 1")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert complaints == []
        browser.close()


@pytest.fixture(scope="module")
def page_of_a_run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of three updates that went on after the second one; images of a fourth are another course's."""
    out = tmp_path_factory.mktemp("progress") / "out"
    values = {"estimator": "full-bp", "heldout_reward_fn": "jpeg-compressibility", "kl_interval": 1}
    values |= {"validation_prompt": PROMPTS, "num_validation_images": 1, "validation_steps": 1}
    config = config_file(workplace, out, **values, max_train_steps=2)
    train_here(config)
    run, progress = train_here(config, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    for step in (3, 4):
        shutil.copytree(out / "validation" / "step-000001", out / "validation" / f"step-{step:06d}")
    progress.evaluation_seconds = 50
    assert "Update 3 of 3</strong>" in (out / PROGRESS_PAGE).read_text(encoding="utf-8")
    page = ProgressPage(run, read_metrics(out / METRICS_LOG))
    page.write(progress, "trained")
    return out / PROGRESS_PAGE


def test_a_page_that_cannot_be_written_is_told_of_and_holds_no_secret(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = build(config_file(workplace, tmp_path / "out", validation_prompt=["https://me:s3cret@example.com/"]))
    page = ProgressPage(run, [])
    page.write(Progress())
    text = (tmp_path / "out" / PROGRESS_PAGE).read_text(encoding="utf-8")
    assert "the first update is on its way" in text and "s3cret" not in text
    (tmp_path / "out" / PROGRESS_PAGE).unlink()
    (tmp_path / "out" / PROGRESS_PAGE).mkdir()
    with caplog.at_level(logging.WARNING):
        page.write(Progress())
    assert "progress.html cannot be written" in caplog.text


def test_long_curves_are_thinned_to_means_of_neighbours() -> None:
    points = [(step, float(step), 0.3) for step in range(1, 1001)]
    thin = thinned(points, most=400)
    assert len(thin) == 334 and thin[0] == pytest.approx((2, 2, 0.3 / 3**0.5)) and thin[-1] == (1000, 1000, 0.3)
    assert thinned(points[:400]) == points[:400] and thinned([]) == []
