"""Secrets are crossed out of what is shown and published, and nothing else is."""

import html
import json
import logging
import shlex
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlr_peft.config import ConfigError, config_from_dict, config_to_dict, config_to_yaml, knobs, load_config
from rlr_peft.errors import RewardError, UserError
from rlr_peft.json_server import JsonServer
from rlr_peft.lora import AdapterNotFoundError
from rlr_peft.prompt import PromptError
from rlr_peft.prompts import EndpointModel
from rlr_peft.redaction import (
    is_secret_name,
    redacted,
    redacted_address,
    redacted_command,
    redacted_values,
    secrets_of_command,
)
from rlr_peft.rewards import load_reward
from tests.secret_spellings import ADDRESSES, OTHERS, SECRET

REQUIRED = {"pretrained_model_name_or_path": "tiny-shapes", "prompt_path": "simple-animals"}
EXPECTED = "expected http://HOST:PORT/PATH or https://HOST/PATH, got "
AMBIGUOUS = {f'http://host/?token={SECRET}"{SECRET}'}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reward_fn: http://me:pass@host:8000/v1", "reward_fn: http://***@host:8000/v1"),
        ("https://sk-12345@host/", "https://***@host/"),
        ("{'http://host/?token=abc': 1.0}", "{'http://host/?token=***': 1.0}"),
        ("http://host/v1?api-version=1&api_key=abc&n=2", "http://host/v1?api-version=1&api_key=***&n=2"),
        ("http://host/?X-Signature=a%2Bb#end", "http://host/?X-Signature=***#***"),
        (f"hf_{'a' * 30}", "***"),
        ("http://me:a@b\"c'd<e@host/", "http://***@host/"),
        ("http://me:a b@host/ and more", "http://***@host/ and more"),
        ("got 'http://me:a@[::1', and", "got 'http://***@*** and"),
        ("got http://host:80a/x; correct it", "got http://host:*** correct it"),
        ("http://me:pw@[::1]:8000/x", "http://***@[::1]:8000/x"),
    ],
)
def test_secrets_in_addresses(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/owner/name?library=diffusers",
        "write to me@host.example, see http://host/path; mailto:me@host.example",
        "[x](https://host/a) and me@host",
        "monkey=3, http://host/a and keys=4",
        "expected http://HOST:PORT/PATH or https://HOST/PATH, user/name@revision",
        "C:\\pictures\\a@b /data/a@b/rewards.py:fn package.module:callable",
        "a red ball: code=4, key: love, token=token, sort(key=len), num_tokens=5, hub_token: null",
        '<a href="http://host">me@x</a> {"a":"http://host","b":"me@x"}',
        'a{color:red}@media (x) <svg xmlns:xlink="http://www.w3.org/1999/xlink"/>',
        "give it by `hf auth login`, by the environment variable HF_TOKEN, or by --hub_token.",
        "from huggingface_hub import hf_hub_download, hf_transfer",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_shows_its_secret_in_no_form(address: str) -> None:
    forms = [
        redacted_address(address),
        redacted(address),
        redacted(f"got '{address}'; change it"),
        redacted(f"got `{address}`, and ({address}) and more"),
        redacted(f"--reward_fn={address} --rank 4"),
        redacted(f"{ {address: 1.0}!r}, x"),
        redacted(json.dumps({"reward_fn": [address], "b": 1})),
        redacted(json.dumps(json.dumps(address))) if "\\/" not in address else "",
        redacted(yaml.safe_dump({"reward_fn": address, "x": "y"})),
        redacted(shlex.join(["--reward_fn", address])),
        redacted(f"<td>{html.escape(address)}</td>"),
        json.dumps(redacted_values({"reward_fn": {address: 1.0}, "a": [address]})),
        *([] if address in AMBIGUOUS else [redacted(f'got "{address}", and')]),
    ]
    assert not [form for form in forms if SECRET in form]
    assert [redacted(form) for form in forms] == forms


@pytest.mark.parametrize("text", OTHERS)
def test_what_else_is_a_secret(text: str) -> None:
    assert SECRET not in redacted(f"a {text} b")
    assert redacted(redacted(text)) == redacted(text)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab1:/@?#&=;'\"<> [].%\\*-_", max_size=40))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once = redacted(f"http://{text}")
    assert redacted(once) == once


def test_a_command_keeps_everything_but_secrets() -> None:
    words = ["train.py", "--hub_token", SECRET, "--rank", "4", f"--hub_token={SECRET}", *("--reward_fn", ADDRESSES[0])]
    assert redacted_command(words) == ["train.py", "--rank", "4", "--reward_fn", "http://***@host:8000/v1"]
    assert secrets_of_command([*words, "--hub_token", "a", "b"]) == [SECRET, SECRET, "a", "b"]
    assert [name for name in knobs() if is_secret_name(name)] == ["hub_token"]


def test_every_error_is_redacted_when_it_is_made() -> None:
    for kind in (UserError, ConfigError, RewardError, AdapterNotFoundError):
        error = kind(f"got {ADDRESSES[0]}; change it")
        assert str(error) == "got http://***@host:8000/v1; change it" and SECRET not in repr(error)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_mistyped_address_is_refused_without_its_secret(address: str) -> None:
    """Also one that is none: where it can be loaded, its name is clean."""
    for load, kind in (
        (lambda: load_reward(address).name, RewardError),
        (lambda: EndpointModel(address, "model").name, PromptError),
        (lambda: JsonServer(address, 1, 0, 0).name, ValueError),
    ):
        try:
            said = load()
        except kind as error:
            said = f"{error!r} {error}"
        assert SECRET not in said


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://me:Zq7kSecret@host:80a/", "http://***@host:***': " + EXPECTED + "a port"),
        ("http://me:Zq7kSecret@", "http://***@': " + EXPECTED + "no host"),
        ("ftp://me:Zq7kSecret@host/", "ftp://***@host/': " + EXPECTED + "another"),
        ("http://me:Zq7kSecret@[::1", "http://***@***': " + EXPECTED + "a host"),
    ],
)
def test_a_mistyped_address_is_explained(address: str, problem: str) -> None:
    with pytest.raises(RewardError) as caught:
        load_reward(address)
    assert f"reward server '{problem}" in str(caught.value)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_config_shows_no_secret_and_says_when_one_is_missing(address: str) -> None:
    values = {**REQUIRED, "reward_fn": {address: 1.0}}
    config = config_from_dict(values)
    saved = config_to_yaml(config)
    assert SECRET not in saved + json.dumps(config_to_dict(config))
    assert next(iter(config.reward.reward_fn)) == address
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**values, "heldout_reward_fn": [address]})
    assert "expected another reward" in str(caught.value) and SECRET not in str(caught.value)
    if "//" in address:
        with pytest.raises(ConfigError, match=r"reward_fn: expected a whole address, got .*\*\*\* stands for"):
            config_from_dict(yaml.safe_load(saved))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (f"hub_token: [{SECRET}]", []),
        (f"hub_token: '{SECRET}", []),
        (f"hub_token: *{SECRET}", []),
        (f"hub_token: !{SECRET} x", []),
        (f"reward_fn: [http://me:{SECRET}@host/", []),
        (f"rank: http://me:{SECRET}@host/", []),
        ("rank: 4", ["--hub_token", "x", SECRET]),
        ("rank: 4", ["--rank", f"http://me:{SECRET}@host/"]),
        ("rank: 4", [f"--hub_tokn={SECRET}"]),
        ("rank: 4", [f"http://host/?k={SECRET}"]),
    ],
)
def test_what_cannot_be_read_is_not_quoted_with_its_secret(tmp_path, text: str, flags: list[str]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    required = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(path), *required, "--reward_fn", "tiny-shapes", *flags])
    assert SECRET not in f"{caught.value!r}"


@pytest.mark.parametrize("command", ["push", "card", "merge", "serve-reward", "config", "compare"])
def test_a_command_line_that_cannot_be_read_is_not_quoted_with_its_secret(command: str) -> None:
    words = ["--hub_token", "x", SECRET, f"--hub_tokn={SECRET}", "--nonsense", f"http://me:{SECRET}@host/"]
    done = subprocess.run(
        [sys.executable, "-m", "rlr_peft", command, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_logs_and_tracebacks_of_anybody_are_redacted() -> None:
    program = (
        "import logging; from rlr_peft.build.reporting import set_up_logging; set_up_logging()\n"
        "logger = logging.getLogger('urllib3'); logger.addHandler(logging.StreamHandler())\n"
        f"logger.warning('Retrying after %s: /score?token=%s', {ADDRESSES[0]!r}, {SECRET!r})\n"
        f"try: raise ValueError({ADDRESSES[0]!r})\nexcept ValueError: logger.exception('failed')\n"
        f"raise KeyError({ADDRESSES[0]!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("Retrying after http://***@host:8000/v1: /score?token=***") == 2
    lines = [line for line in done.stderr.splitlines() if SECRET in line]
    assert not lines and done.stderr.count("Traceback") == 3 and "KeyError: 'http://***@host:8000/v1'" in done.stderr
    assert logging.getLogRecordFactory() is logging.LogRecord
