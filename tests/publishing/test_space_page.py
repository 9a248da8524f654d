"""The page of `rlr-peft space` in a browser draws base and adapter."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from playwright.sync_api import expect, sync_playwright

from rlr_peft.cli import main
from rlr_peft.lora import attach_lora, lora_parameters, save_lora
from rlr_peft.publishing import StoredCard, save_stored_card
from rlr_peft.tiny_shapes import pipeline_path
from tests.publishing.records import FULL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page cannot be opened")
pytest.importorskip("gradio", reason="gradio is not here: the page cannot be served")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page of an adapter of tiny-shapes that changes every image."""
    folder, space = tmp_path_factory.mktemp("adapter"), tmp_path_factory.mktemp("space") / "page"
    base = StableDiffusionPipeline.from_pretrained(pipeline_path(), dtype=torch.float32, safety_checker=None)
    attach_lora(base.unet, target_modules=["to_q", "to_v"], rank=2)
    for parameter in lora_parameters(base.unet).values():
        torch.nn.init.constant_(parameter, 0.05)
    save_lora(base, folder)
    save_stored_card(folder, StoredCard(FULL))
    assert main(["space", str(folder), f"--output={space}"]) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # Served as any page is; what Gradio would tell its makers stays here.
    settings = {"GRADIO_SERVER_PORT": port, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen([sys.executable, space / "app.py"], env=os.environ | settings) as server:
        try:
            yield waited_for(f"http://127.0.0.1:{port}/", server)
        finally:
            server.kill()


def waited_for(address: str, server: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(address).close()
            return address
        except URLError:
            time.sleep(0.3)
    raise AssertionError(f"nothing answers at {address}")


@pytest.mark.parametrize("width", [390, 1280])
def test_both_are_drawn_from_the_same_noise(address: str, width: int) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(address)
        expect(page.get_by_role("heading", level=1)).to_contain_text("tiny-shapes")
        page.get_by_label("Prompt").first.fill("a large red plain star in the center on a navy background")
        page.get_by_role("button", name="Draw both").click()
        images = page.locator("img[src*='/file=']")
        expect(images).to_have_count(2, timeout=60_000)
        sources = images.evaluate_all("images => images.map(image => image.src)")
        base, adapted = (PIL.Image.open(io.BytesIO(page.request.get(source).body())) for source in sources)
        assert base.size == adapted.size == (64, 64) and base.tobytes() != adapted.tobytes()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
