"""A whole run against reward servers whose addresses hold secrets: no file, upload, log or message shows one."""

import html
import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.hub.folders import output_folder
from tests.hub.processes import OWNER, LoopbackHub, run
from tests.programs import ROOT
from tests.secret_spellings import ADDRESSES, SECRET, addresses_of
from tests.training.runs import WEIGHTS, config_file

SCRIPT = ["tests/hub/impatient.py", "train_rlr_lora.py", "--config"]


def test_a_published_run_shows_no_secret_of_any_address(hub: LoopbackHub, workplace: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tests" / "rewards" / "faulty_server.py")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            _run_and_look(endpoint, hub, workplace, tmp_path)
        finally:
            server.kill()


def test_no_spelling_of_an_address_is_published_with_its_secret(hub: LoopbackHub, tmp_path: Path) -> None:
    """Files of a folder from anywhere: raw, as a run of ours never writes them."""
    out = output_folder(tmp_path / "out")
    assert len(ADDRESSES) > 50
    (out / "config.yaml").write_text(yaml.safe_dump({"reward_fn": dict.fromkeys(ADDRESSES, 1.0)}))
    (out / "metrics.json").write_text(json.dumps(ADDRESSES))
    (out / "metrics.jsonl").write_text("".join(json.dumps({text: 1}) + "\n" for text in ADDRESSES))
    (out / "README.md").write_text("".join(f"- got `{text}`, and\n" for text in ADDRESSES))
    (out / "compare.html").write_text("".join(f"<td>{html.escape(text)}</td>\n" for text in ADDRESSES))
    words = ["tests/hub/impatient.py", "-m", "rlr_peft", "push", out, "--hub_model_id", "owner/spellings"]
    done = run(words, hub.environment())
    published = [path.read_bytes() for path in hub.root.rglob("*") if path.is_file()]
    assert not [content for content in published if SECRET.encode() in content]
    assert SECRET not in done.stdout + done.stderr
    for name in ("config.yaml", "metrics.json", "metrics.jsonl", "README.md", "compare.html"):
        assert hub.repository("owner/spellings").read(name).count(b"***") > 50, name


def _run_and_look(endpoint: str, hub: LoopbackHub, workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    *trained, flag = addresses_of(endpoint)[3::4]  # the mechanism's own tests have all of them
    assert len(trained) > 5 and any(mark in one for one in trained for mark in "\"'<")
    # urllib3 logs the path and the query of a connection that breaks.
    trained = [f"{endpoint}/reset-once?token={SECRET}", *trained]
    config = config_file(
        workplace,
        out,
        reward_fn=dict.fromkeys(trained[:3], 1.0),
        heldout_reward_fn=trained[3:],
        max_train_steps=1,
        num_inference_steps=2,
        gradient_accumulation_steps=1,
        evaluation_prompt_path=str(workplace / "unseen.txt"),
        num_evaluation_images=2,
        report_to="tensorboard",
        estimator="reinforce",
        push_to_hub=True,
        hub_model_id="owner/addresses",
    )
    # The flags win over the file: the one address is on the command line, which the card shows.
    flags = ["--hub_token", OWNER, "--heldout_reward_fn", *trained[3:], flag]
    done = run([*SCRIPT, config, *flags], hub.environment(token=None))
    everything = [path for folder in (out, hub.root) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in everything}
    assert {"config.yaml", "run_record.json", "README.md", "metrics.json", "compare.html", WEIGHTS} <= names
    assert any(name.startswith("events.out") for name in names)
    for secret in (SECRET, OWNER):
        assert not [path for path in everything if secret.encode() in path.read_bytes()]
        assert secret not in done.stdout + done.stderr
    assert "reset-once gave no answer" in done.stderr
    card = hub.repository("owner/addresses").read("README.md").decode()
    assert "--heldout_reward_fn" in card and "http://***@127.0.0.1" in card and "--hub_token" not in card
    assert json.loads((out / "run_record.json").read_text())["record"]["config"]["hub_token"] is None

    # The saved config says itself that it is not whole.
    words = [sys.executable, "-m", "rlr_peft", "config", "--config", str(out / "config.yaml")]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert refused.returncode == 2 and "reward_fn: expected a whole address" in refused.stderr
