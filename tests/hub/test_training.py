"""The training script and the Hub: access first, checkpoints on the way, the result at the end, and nothing lost."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.hub.processes import OWNER, READER, LoopbackHub, run
from tests.pipelines import tiny_stable_diffusion
from tests.programs import LIBRARIES
from tests.test_lora_fitting import adapter_of
from tests.training.runs import WEIGHTS, config_file

SCRIPT = ["tests/hub/impatient.py", "train_rlr_lora.py", "--config"]
LOAD = r"""
import json, re, sys, torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
from PIL import Image
base, local, repo = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.set_progress_bar_config(disable=True)

def images(adapter, **where):
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors", **where)
    assert pipe.get_active_adapters()
    noise = torch.Generator().manual_seed(0)
    return pipe(["red ball"] * 2, generator=noise, num_inference_steps=3, output_type="pt").images

mine = images(local)
same = torch.equal(images(repo), mine)
checkpoint = torch.equal(images(repo, revision="checkpoint-1"), mine)
refused = []
for load in (lambda: images(repo, token=False, force_download=True), lambda: HfApi(token=False).model_info(repo)):
    try:
        load()
    except OSError as error:
        refused.append(type(error).__name__)

# The card's snippet as it stands, downloaded from the Hub; then with the local adapter, and without any.
card = open(hf_hub_download(repo, "README.md")).read()
(code,) = re.findall(r"^```python\n(.*?)\n```$", card, flags=re.M | re.S)
(line,) = re.findall(r"^pipe.load_lora_weights.*$", code, flags=re.M)
pictures = []
for variant in (code, code.replace(f'"{repo}"', repr(local)), code.replace(line, "")):
    exec(variant, {})
    pictures.append(Image.open("image.png").tobytes())
snippet = [picture == pictures[0] for picture in pictures[1:]]
print(json.dumps([same, checkpoint, refused, snippet]))
"""


def train(hub: LoopbackHub, config: Path, *flags: str, code: int = 0, token: str | None = OWNER):  # type: ignore[no-untyped-def]
    return run([*SCRIPT, config, *flags], hub.environment(token), code)


def test_a_run_is_published_and_loads_from_the_hub(hub: LoopbackHub, workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = config_file(
        workplace,
        out,
        max_train_steps=2,
        checkpointing_steps=1,
        checkpoints_total_limit=1,
        evaluation_prompt_path=str(workplace / "unseen.txt"),
        num_evaluation_images=4,
        report_to="tensorboard",
        push_to_hub=True,
        push_every=1,
        hub_private_repo=True,
        output_kohya_format=True,
    )
    done = train(hub, config, "--hub_model_id", "owner/red", "--hub_token", OWNER, token=None)
    repository = hub.repository("owner/red")
    (result, _) = repository.history("main")
    assert result["summary"].startswith("Upload LoRA adapter: rewards.py:redness +") and "±" in result["summary"]
    files = repository.files("main")
    assert {"README.md", WEIGHTS, "config.yaml", "metrics.json", "metrics.jsonl", "before_after.png"} <= set(files)
    # One file at the top, which `load_lora_weights` finds; copies in other formats stand below.
    assert [name for name in files if name.endswith(".safetensors")] == ["kohya/lora_kohya.safetensors", WEIGHTS]
    assert not [name for name in files if "checkpoint" in name or name.endswith(".pt") or "logs" in name]
    assert f"Published on {hub.endpoint}/owner/red" in done.stdout

    # Checkpoint 1 was published on its way, before `checkpoints_total_limit` deleted it.
    assert set(repository.info["branches"]) == {"main", "checkpoint-1", "checkpoint-2"}
    assert repository.read(WEIGHTS, "checkpoint-1") != repository.read(WEIGHTS, "checkpoint-2")
    assert repository.read(WEIGHTS, "checkpoint-2") == repository.read(WEIGHTS) == (out / WEIGHTS).read_bytes()
    assert not list(out.glob(".checkpoint-*"))

    # The token was given on the command line, and is nowhere.
    everything = [path for folder in (out, hub.root) for path in folder.rglob("*") if path.is_file()]
    assert len(everything) > 30
    assert not [path for path in everything if OWNER.encode() in path.read_bytes()]
    assert OWNER not in done.stdout + done.stderr

    words = ["-c", LOAD, workplace / "base", out, "owner/red"]
    loaded = run(words, hub.environment(HF_HOME=str(tmp_path / "fresh")), cwd=tmp_path, imported=LIBRARIES)
    same, checkpoint_is_same, refused, snippet = json.loads(loaded.stdout)
    assert snippet == [True, False]
    assert same and not checkpoint_is_same
    assert refused == ["OSError", "RepositoryNotFoundError"], "a private repository gives nothing without a token"


def test_a_failing_hub_stops_no_training_and_loses_nothing(hub: LoopbackHub, workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = {"max_train_steps": 2, "checkpointing_steps": 1, "push_to_hub": True, "push_every": 1}
    config = config_file(workplace, out, hub_model_id="owner/failing", **values)
    hub.fail(
        {"request": "POST .*/branch/checkpoint-1", "kind": "status", "status": 500},
        {"request": "POST .*/commit/main", "kind": "refuse"},
    )
    done = train(hub, config, code=1)
    errors = done.stderr[done.stderr.index("error: ") :]
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "cannot be reached" in errors and f"\n  rlr-peft push {out} --hub_model_id owner/failing\n" in errors
    assert (
        f"checkpoint-1 was not published: The Hub at {hub.endpoint} has trouble of its own (HTTP 500: fault). Publish "
        f"it with\n  rlr-peft push {out}/checkpoint-1 --hub_model_id owner/failing --hub_revision checkpoint-1"
        in errors
    )
    assert "Trained 2 steps" in done.stdout
    for name in (WEIGHTS, "README.md", "metrics.json", "config.yaml", "checkpoint-2/optimizer.pt"):
        assert (out / name).stat().st_size > 0
    assert "checkpoint-2" in hub.repository("owner/failing").info["branches"]

    hub.fail()
    environment = hub.environment()
    pushed = run(["-m", "rlr_peft", "push", out], environment)  # the name is in config.yaml
    assert pushed.stdout.startswith(f"Publishing on owner/failing, as {out}/config.yaml says.\nPublished on ")
    flags = ["--hub_model_id", "owner/failing", "--hub_revision", "checkpoint-1"]
    run(["-m", "rlr_peft", "push", out / "checkpoint-1", *flags], environment)
    for name, revision in ((out, "main"), (out / "checkpoint-1", "checkpoint-1")):
        assert hub.repository("owner/failing").read(WEIGHTS, revision) == (name / WEIGHTS).read_bytes()


PUT = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("owner/first", private=True)
HfApi().upload_folder(repo_id="owner/first", folder_path=sys.argv[1])
"""


def test_a_private_repository_is_a_start(hub: LoopbackHub, workplace: Path, tmp_path: Path) -> None:
    """Supervised first and on the Hub, then by reward: a rate of nearly 0 leaves the weights that it began with."""
    first = adapter_of(tiny_stable_diffusion(), tmp_path / "first", rank=2)
    run(["-c", PUT, first], hub.environment(OWNER), imported=LIBRARIES)
    values = {"estimator": "nft", "rank": 2, "max_train_steps": 1, "learning_rate": 1e-9}
    config = config_file(workplace, tmp_path / "out", **values, init_adapter="owner/first")
    train(hub, config)
    begun, ended = load_file(first / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert begun.keys() == ended.keys()
    for name, weight in begun.items():
        torch.testing.assert_close(ended[name], weight, rtol=0, atol=1e-6)
    refused = train(hub, config, code=1, token=None)
    assert "owner/first was not found, or is private" in refused.stderr and "Steps" not in refused.stderr


def test_access_is_checked_before_training(hub: LoopbackHub, workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out", max_train_steps=1, push_to_hub=True)
    done = train(hub, config, token=READER, code=1)
    assert "may only read" in done.stderr and "Training was not started" in done.stderr
    assert not (tmp_path / "out").exists() and not hub.requests("POST")


READ_PROMPTS = """
import json, sys
from rlr_peft.prompt import PromptError, texts_of
from rlr_peft.prompts.rows import Columns
from rlr_peft.prompts.tables import dataset_prompts
from rlr_peft.prompts.tables import DatasetSpec
for name, streaming in json.loads(sys.argv[1]):
    try:
        print(json.dumps(texts_of(dataset_prompts(DatasetSpec(name, streaming=streaming), Columns()))))
    except PromptError as error:
        print(json.dumps(str(error)))
"""
READ_SEVERAL = """
import json, sys
from rlr_peft.build.prompts import read_prompts
from rlr_peft.config import load_config
from rlr_peft.prompt import texts_of
flags = "--reward_fn tiny-shapes --pretrained_model_name_or_path tiny-shapes --max_train_samples 2".split()
found = read_prompts(load_config([*flags, "--prompt_path", sys.argv[1]]))
assert found.counts == (2, 2, 2)
print(json.dumps(texts_of(found.training)[:5]))
"""


def test_prompts_are_read_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Whole and streamed, as they are written; offline what was fetched before."""
    files = {
        "json": ("train.jsonl", '{"text": "a red ball"}\n{"text": "None", "late": [1]}\n'),
        "csv": ("train.csv", "text\na red ball\nNone\n"),
        "commas": ("train.csv", "text\na red ball\na ball, red\n"),
    }
    create = """
import json, sys
from huggingface_hub import HfApi
for name, (path, content) in json.loads(sys.argv[1]).items():
    HfApi().create_repo(f"owner/{name}", repo_type="dataset", private=True)
    HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=f"data/{path}", repo_id=f"owner/{name}",
        repo_type="dataset")
"""
    run(["-c", create, json.dumps(files)], hub.environment())
    asked = [(f"owner/{name}", streaming) for name in files for streaming in (True, False)]
    texts = ["a red ball", "None"]
    done = run(["-c", READ_PROMPTS, json.dumps(asked)], hub.environment())
    *read, refused, also_refused = map(json.loads, done.stdout.splitlines())
    assert read == [texts] * 4
    assert refused == also_refused
    assert refused.startswith("prompts 'owner/commas', train.csv, line 3: expected as many cells as the header has")
    assert hub.requests("/datasets/owner/json/resolve/")
    weights = json.dumps({"owner/json": 2, "owner/csv": 1, "simple-animals": 1})
    done = run(["-c", READ_SEVERAL, weights], hub.environment(), imported=LIBRARIES)
    assert json.loads(done.stdout) == [*texts * 2, "cat"]
    hub.fail()
    offline = hub.environment(HF_HUB_OFFLINE="1")
    done = run(
        ["-c", READ_PROMPTS, json.dumps([("owner/csv", False), ("owner/never", False)])], offline, imported=LIBRARIES
    )
    read, unknown = map(json.loads, done.stdout.splitlines())
    assert read == texts and not hub.requests()
    assert "Offline: owner/csv is read as far as its files are in the cache" in done.stderr
    assert unknown.startswith("prompts 'owner/never': cannot be read: ") and "Traceback" not in done.stderr
