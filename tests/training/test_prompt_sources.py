"""The training script on every source of prompts, one update each, and what rewards are told of them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from rlr_peft.build import derive_seed
from rlr_peft.config import ConfigError
from rlr_peft.figures import save_image_grid
from rlr_peft.inference import DiffusiveChainOfThought
from rlr_peft.prompt import Prompt, PromptError, texts_of
from rlr_peft.prompts import builtin_texts
from rlr_peft.training import evaluate_base, save_validation_images, stage_prompts_in_words
from tests.prompts.chat_server import chat_server, completion
from tests.prompts.test_language_models import small_language_model
from tests.training.runs import WEIGHTS, build, run_on_two_processes, run_script, train_here

REWARD = """
import json
import logging
from pathlib import Path

class Noted:
    differentiable = True

    def __call__(self, images, prompts, metadata):
        with Path(__file__).with_name("seen.jsonl").open("a") as file:
            for prompt, facts in zip(prompts, metadata):
                file.write(json.dumps([str(prompt), facts]) + "\\n")
        return images[:, 0].flatten(1).mean(1)
"""
ROWS = [
    {"caption": text, "ugly": ugly, "far": f"far {text}", "near": f"near {text}", "points": i}
    for i, (text, ugly) in enumerate([("cat", "dog"), ("sky", None), ("sea", ""), ("ant", "bee"), ("fox", "hen")])
]
TEXTS = [row["caption"] for row in ROWS]
TABLE = {"caption_column": "caption", "negative_prompt_column": "ugly", "metadata_columns": ["points"]}
STAGES = '{"coarse": "a wide | open sky", "mid": "an animal", "fine": "fur"}'


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A folder with all sources, and a reward that notes what it is told."""
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = datasets.Dataset.from_list(ROWS)
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path


def config_of(workplace: Path, place: Path, **values: Any) -> Path:
    def there(value: Any) -> Any:
        if isinstance(value, dict):
            return {there(name): weight for name, weight in value.items()}
        return str(place / value[1:]) if str(value)[:1] == "@" else value

    values = {name: there(value) for name, value in values.items()}
    config = {
        "pretrained_model_name_or_path": str(workplace / "base"),
        "reward_fn": f"{place / 'reward.py'}:Noted",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "estimator": "rlr",
        "fo_steps": 1,
        "train_batch_size": 4,
        "num_images_per_prompt": 2,
        "max_train_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        "skip_final_inference": True,
        "output_dir": str(place / "out"),
        **values,
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in config.items() if value is not None}))
    return path


def seen(place: Path) -> list[tuple[str, dict[str, Any]]]:
    return [tuple(json.loads(line)) for line in (place / "seen.jsonl").read_text().splitlines()]


SOURCES: dict[str, dict[str, Any]] = {
    "txt": {"prompt_path": "@prompts.txt"},
    "built-in": {"prompt_path": "simple-animals"},
    "jsonl": {"prompt_path": "@rows.jsonl", **TABLE},
    "csv": {"prompt_path": "@rows.csv", **TABLE},
    "parquet": {"prompt_path": "@rows.parquet", **TABLE},
    "dataset": {"dataset_name": "@data", **TABLE},
    "streaming": {"dataset_name": "@data", "streaming": True, "shuffle_buffer_size": 3, **TABLE},
}


@pytest.mark.parametrize("source", SOURCES)
def test_one_update_from_every_source(source: str, workplace: Path, place: Path) -> None:
    train_here(config_of(workplace, place, **SOURCES[source]))
    assert (place / "out" / "checkpoint-1" / WEIGHTS).stat().st_size > 0
    told = seen(place)
    assert len(told) == 4 and told[0] == told[1] != told[2] == told[3], "two prompts, two samples each, side by side"
    known = dict.fromkeys(builtin_texts("simple-animals") or ()) if source == "built-in" else dict.fromkeys(TEXTS)
    for text, facts in told:
        assert text in known
        if "metadata_columns" in SOURCES[source]:  # a cell of a .csv is text
            assert facts == {"points": str(TEXTS.index(text)) if source == "csv" else TEXTS.index(text)}
        else:
            assert not facts


CHAINS_OF_THOUGHT = {
    "columns": ({"dcot_columns": ["far", "near"]}, "columns of the prompt data", ("far", "near")),
    "rules": ({"dcot_rules": True}, "built-in rules", ("coarse", "mid", "fine")),
    "model": ({"dcot_model": "@model"}, "the language model", ("coarse", "mid", "fine")),
    "endpoint": ({"dcot_endpoint_model": "splitter"}, "the language model `splitter`", ("coarse", "mid", "fine")),
}


@pytest.mark.parametrize("source", CHAINS_OF_THOUGHT)
def test_one_update_from_every_source_of_stage_prompts(
    source: str, workplace: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values, words, names = CHAINS_OF_THOUGHT[source]
    config = config_of(workplace, place, prompt_path="@rows.jsonl", **TABLE, **values)
    if source == "model":
        small_language_model(place / "model", dict.fromkeys(TEXTS, STAGES))
    with chat_server(completion("As you wish:"), completion(STAGES)) as server:
        flags = ["--dcot_endpoint", server.url] if source == "endpoint" else []
        with caplog.at_level(logging.WARNING):
            run_script(monkeypatch, config, *flags)
    assert {text for text, _ in seen(place)} <= set(TEXTS), "rewards judge by the whole prompt"
    card = (place / "out" / "README.md").read_text()
    subject = "The stages' parts" if source == "rules" else "The stage prompts"
    assert f"{subject} came from {words}" in card and f"{names[0]} (steps 3-" in card
    example = f"far {TEXTS[0]}" if source == "columns" else TEXTS[0] if source == "rules" else "a wide \\| open sky"
    assert f"| {names[0]} | {100 / len(names):.0f}% | {example} |" in card
    assert 'DiffusiveChainOfThought.from_config(pipe, "config.yaml", eta=' in card
    remembered = place / "out" / "stage_prompts.jsonl"
    assert remembered.exists() == (source in ("model", "endpoint"))
    if source == "endpoint":
        assert len(server.requests) == len(TEXTS) + 1, "every text once, and the malformed answer again"
        assert "rejected answer 1 of at most 3 of splitter at 127.0.0.1: no JSON object" in caplog.text
        lines = [json.loads(line) for line in remembered.read_text().splitlines()]
        assert lines == [{"prompt": text, **json.loads(STAGES)} for text in TEXTS]


def test_an_edited_file_is_used_and_nobody_is_asked(workplace: Path, place: Path) -> None:
    lines = [{"prompt": text, "coarse": f"edited {text}", "mid": "b", "fine": "c"} for text in [*TEXTS, "unseen"]]
    (place / "edited.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    values = {"dcot_endpoint": "http://127.0.0.1:9/v1", "dcot_endpoint_model": "m", "dcot_cache": "@edited.jsonl"}
    run = build(config_of(workplace, place, prompt_path="@prompts.txt", validation_prompt=["unseen"], **values))
    for prompt in [*run.prompts, *run.validation_prompts]:
        assert isinstance(prompt, Prompt) and prompt.stages == (f"edited {prompt.text}", "b", "c")


def test_validation_and_evaluation_draw_with_stage_prompts(workplace: Path, place: Path) -> None:
    values = {"validation_split_percentage": 40, "num_evaluation_images": 4, "validation_prompt": ["owl, 8k"]}
    values |= {"num_validation_images": 2, "dcot_columns": ["far", "near"], "evaluation_eta": 0.3}
    run = build(config_of(workplace, place, prompt_path="@rows.jsonl", **TABLE, **values))
    assert run.evaluation_prompts is not None and len(run.evaluation_prompts) == 2
    assert sorted(texts_of([*run.evaluation_prompts, *run.prompts])) == sorted(TEXTS), (
        "unseen prompts are never trained on"
    )
    base = evaluate_base(run)
    assert base is not None
    dcot = DiffusiveChainOfThought(
        run.pipeline, stages=("far", "near"), num_inference_steps=3, guidance_scale=3.0, eta=0.3
    )
    given = [
        Prompt(text, ROWS[TEXTS.index(text)]["ugly"] or "", (f"far {text}", f"near {text}"))
        for text in texts_of(base.prompts)
    ]
    assert torch.equal(dcot(given, seeds=base.seeds, output_type="pt").images, base.images)

    drawn = save_validation_images(run, 0, "validation")
    assert drawn is not None
    seeds = [derive_seed(0, "validation", i) for i in range(2)]
    images = dcot([("owl, 8k", "owl, 8k")] * 2, seeds=seeds, output_type="pt").images
    captions = [f"owl, 8k: {score:.3f}" for score in json.loads(drawn.with_suffix(".json").read_text())["scores"]]
    save_image_grid(place / "expected.png", images, captions, columns=2, title="Base")
    assert drawn.read_bytes() == (place / "expected.png").read_bytes()


RESUMED: dict[str, dict[str, Any]] = {
    "streaming": {"dataset_name": "@data", "streaming": True, "shuffle_buffer_size": 2, **TABLE},
    "several": {
        "prompt_path": {"@rows.jsonl": 2, "@data": 1, "tiny-shapes/test": 1},
        "caption_column": "caption",
        "num_images_per_prompt": 1,
        "estimator": "full-bp",
        "fo_steps": None,
    },
    "split": {"prompt_path": "@rows.csv", **TABLE, "validation_split_percentage": 30, "num_evaluation_images": 2},
    "window": {
        "prompt_path": "@rows.jsonl",
        **TABLE,
        "dcot_columns": ["far", "near"],
        "num_inference_steps": 4,
        "ho_blocks": 1,
        "ho_start": "window",
        "ho_window": ["auto"],
        "calibration_samples": 4,
        "calibration_interval": 2,
    },
}


@pytest.mark.parametrize("source", RESUMED)
def test_a_resumed_run_goes_on_at_its_place(
    source: str, workplace: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(workplace, place, max_train_steps=5, checkpointing_steps=3, **RESUMED[source])
    with caplog.at_level(logging.INFO):
        run_script(monkeypatch, config)
    whole, parts, told = place / "out", place / "parts", seen(place)
    parts.mkdir()
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", parts)
    (place / "seen.jsonl").unlink()
    train_here(config, "--output_dir", str(parts), "--resume_from_checkpoint", "latest")
    for file in (WEIGHTS, "estimator.pt"):
        assert (parts / "checkpoint-5" / file).read_bytes() == (whole / "checkpoint-5" / file).read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    if source == "streaming":
        assert seen(place) == told[3 * 4 :], "the last two updates' prompts, in their order"
    if source == "several":
        of_rows = [text for text, _ in told if text in TEXTS]
        assert len(told) == 20 and len(of_rows) == 15 and set(of_rows) == set(TEXTS), "three of every four"
        line = next(message for message in caplog.messages if message.startswith("  Prompts = "))
        assert "(25 % " in line and f", 50 % {place / 'rows.jsonl'}, 25 % " in line
        card = (whole / "README.md").read_text()
        assert "Drawn from 3 sources: 25% of the samples from `data`, 50% of the samples from `rows.jsonl`, 25%" in card
    if source == "window":
        assert "outside the chosen window (measured: stage " in (whole / "README.md").read_text()


def test_a_stream_can_be_split_too(workplace: Path, place: Path) -> None:
    values = {"validation_split_percentage": 50, "num_evaluation_images": 99, "dcot_rules": True}
    run = build(config_of(workplace, place, **SOURCES["streaming"], **values))
    assert run.evaluation_prompts is not None
    used = [prompt for step in range(20) for prompt in run.sampler.sample(step, 3)]
    assert sorted(set(texts_of([*used, *run.evaluation_prompts]))) == sorted(TEXTS)
    assert not set(texts_of(used)) & set(texts_of(run.evaluation_prompts))
    assert all(isinstance(prompt, Prompt) and len(prompt.stages) == 3 for prompt in [*used, *run.evaluation_prompts])
    first, *others = stage_prompts_in_words(run)
    assert len(others) == 2 and first == f"{run.prompts[0].text} -> the whole prompt in every stage"
    with pytest.raises(ConfigError, match="expected prompts on both sides of the split"):
        build(config_of(workplace, place, **SOURCES["streaming"], validation_split_percentage=0.001))


def test_unseen_prompts_of_several_sources_are_drawn_by_their_weights(workplace: Path, place: Path) -> None:
    (place / "many.txt").write_text("".join(f"thing {i}\n" for i in range(200)) + "cat\n")
    sources = {"@many.txt": 1, "@rows.jsonl": 3}
    values = {"prompt_path": sources, "validation_split_percentage": 30, "caption_column": "caption"}
    run = build(config_of(workplace, place, **values))
    assert run.evaluation_prompts is not None
    unseen = texts_of(run.evaluation_prompts)
    assert set(unseen).isdisjoint(texts_of(run.prompts)), "a text that both hold is on one side"
    assert sum(text in TEXTS for text in unseen) >= 0.75 * len(unseen) - 1
    sources = {"@many.txt": 1, "@rows.jsonl": 1}
    with pytest.raises(PromptError, match=r"every source on the training side, got none of .*rows"):
        build(config_of(workplace, place, **values | {"prompt_path": sources, "validation_split_percentage": 99}))


def test_over_long_prompts_are_counted(workplace: Path, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "long.txt").write_text("cat\nthe longest of all prompts\nanother long prompt\n")
    with caplog.at_level(logging.WARNING):
        build(config_of(workplace, place, prompt_path="@long.txt"))
    assert (
        "2 of 3 prompts and stage prompts are longer than the 16 tokens that the text encoder sees and lose their end"
        in caplog.text
    )


def test_two_processes_ask_once_and_train_on_the_same_answers(workplace: Path, place: Path) -> None:
    answers = [completion(STAGES.replace("animal", f"animal {i}")) for i in range(99)]  # never the same
    values = {"prompt_path": "@prompts.txt", "dcot_endpoint_model": "m", "num_images_per_prompt": 2}
    with chat_server(*answers) as server:
        run_on_two_processes(config_of(workplace, place, dcot_endpoint=server.url, train_batch_size=2, **values))
    assert len(server.requests) == len(TEXTS)
    told = [text for text, _ in seen(place)]
    assert len(told) == 4 and len(set(told)) == 2, "each process has a prompt of its own"
