"""Secrets are crossed out of what is published, and nothing else is."""

import pytest
from rlr_peft.publishing.redaction import redacted

from rlr_peft.config import config_from_dict
from rlr_peft.training.trainer import _tracker_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reward_fn: http://me:pass@host:8000/v1", "reward_fn: http://***@host:8000/v1"),
        ("https://sk-12345@host/", "https://***@host/"),
        ("{'http://host/?token=abc': 1.0}", "{'http://host/?token=***': 1.0}"),
        ("http://host/v1?api-version=1&api_key=abc&n=2", "http://host/v1?api-version=1&api_key=***&n=2"),
        ("http://host/?X-Signature=a%2Bb#end", "http://host/?X-Signature=***#end"),
        (f"hf_{'a' * 30}", "***"),
    ],
)
def test_secrets_in_addresses(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/owner/name?library=diffusers",
        "write to me@host.example, see http://host/path",
        "[x](https://host/a) and me@host",
        "monkey=3, http://host/a?monkeys and keys=4",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


def test_trackers_get_no_password() -> None:
    config = config_from_dict(
        {
            "pretrained_model_name_or_path": "base",
            "prompt_path": "simple-animals",
            "reward_fn": {"http://me:pass@host/": 1.0, "http://host/?key=word": 2.0},
        }
    )
    values = _tracker_config(config)
    assert values["reward_fn"] == "{'http://***@host/': 1.0, 'http://host/?key=***': 2.0}" and values["rank"] == 4
