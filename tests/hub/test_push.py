"""`rlr-peft push` with the real client: what is published, what is not, and what happens when the Hub fails."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from rlr_peft.publishing import HubError, published_files
from tests.hub.cases import DOCUMENT, INCOMPLETE, LASTING, PASSING, REFUSED, WHOAMI, name_of, with_table
from tests.hub.folders import PRIVATE, WEIGHTS, output_folder
from tests.hub.processes import OWNER, LoopbackHub, run
from tests.programs import EVERYTHING, LIBRARIES, completed

UPLOADED = {
    ".gitattributes",
    "README.md",
    WEIGHTS,
    "before_after.png",
    "config.yaml",
    "images/validation_0.png",
    "metrics.json",
}
PUSH = ["tests/hub/impatient.py", "-m", "rlr_peft", "push"]


def push(
    hub: LoopbackHub, folder: Path, *flags: str, token: str | None = OWNER, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    imported = LIBRARIES if environment else EVERYTHING
    return run([*PUSH, folder, *flags], hub.environment(token, **environment), code, imported=imported)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return output_folder(tmp_path / "out")


def test_one_commit_holds_what_may_be_published(hub: LoopbackHub, folder: Path) -> None:
    done = push(hub, folder, "--hub_model_id", "owner/whole", "--hub_private_repo")
    assert f"Published on {hub.endpoint}/owner/whole (commit" in done.stdout
    repository = hub.repository("owner/whole")
    assert repository.info["private"]
    assert set(repository.files("main")) == UPLOADED
    assert repository.read(WEIGHTS) == (folder / WEIGHTS).read_bytes()
    (commit, _) = repository.history("main")
    assert commit["summary"] == "Upload LoRA adapter: tiny-shapes +0.300 ± 0.012"
    card = repository.read("README.md").decode()
    assert f'pipe.load_lora_weights("owner/whole", weight_name="{WEIGHTS}")' in card
    assert card == (folder / "README.md").read_text()
    # The adapter came back into a cache of its own, not into the user's.
    assert hub.requests(f"GET /owner/whole/resolve/{commit['oid']}/{WEIGHTS}") or hub.requests("GET /download")
    assert not list(hub.home.rglob(WEIGHTS))


def test_nothing_private_leaves_the_folder(hub: LoopbackHub, folder: Path) -> None:
    done = push(hub, folder, "--hub_model_id", "owner/secrets", "--hub_token", OWNER, token=None)
    assert not set(PRIVATE) & set(hub.repository("owner/secrets").files("main"))
    everything = b"".join(path.read_bytes() for path in hub.root.rglob("*") if path.is_file())
    everything += b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml")
    for secret in (OWNER, "secret-word"):
        assert secret.encode() not in everything
        assert secret not in done.stdout + done.stderr
    assert b"http://***@127.0.0.1/" in hub.repository("owner/secrets").read("config.yaml")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """It may come with a folder from elsewhere, and would publish any file of this machine."""
    (tmp_path / "key").write_text("secret")
    (folder / "images" / "key.png").symlink_to(tmp_path / "key")
    with pytest.raises(HubError, match=rf"images/key.png is a link to {tmp_path}/key, outside of the folder; put the"):
        published_files(folder)
    (folder / "images" / "key.png").unlink()
    (tmp_path / "elsewhere").symlink_to(folder)  # the folder itself may be reached over one
    assert WEIGHTS in published_files(tmp_path / "elsewhere")


def test_a_picture_that_holds_the_token_is_refused(hub: LoopbackHub, folder: Path) -> None:
    (folder / "images" / "leak.png").write_bytes(b"\x89PNG" + OWNER.encode())
    done = push(hub, folder, "--hub_model_id", "owner/leak", code=1)
    assert "leak.png holds the access token" in done.stderr and OWNER not in done.stderr
    assert set(hub.repository("owner/leak").files("main")) == {".gitattributes"}


def test_pushing_twice_changes_nothing(hub: LoopbackHub, folder: Path) -> None:
    push(hub, folder, "--hub_model_id", "owner/twice")
    before = hub.repository("owner/twice").history("main")
    card = (folder / "README.md").read_bytes()
    assert "nothing had changed" in push(hub, folder, "--hub_model_id", "owner/twice").stdout
    assert hub.repository("owner/twice").history("main") == before
    assert (folder / "README.md").read_bytes() == card and card.count(b"- lora\n") == 1


def test_a_new_run_replaces_what_the_earlier_one_left(hub: LoopbackHub, folder: Path) -> None:
    (folder / "kohya").mkdir()
    (folder / "kohya" / "lora_kohya.safetensors").write_bytes(b"earlier")
    push(hub, folder, "--hub_model_id", "owner/replaced")
    repository = hub.repository("owner/replaced")
    header = {"key": "header", "value": {"summary": "by hand"}}
    mine = ["notes.txt", "images/mine.png", "images/drafts/base_0.png"]
    files = [{"key": "file", "value": {"path": name, "content": ""}} for name in (*mine, "images/base_3.png")]
    repository.commit("main", [header, *files])
    push(hub, output_folder(folder.parent / "next"), "--hub_model_id", "owner/replaced")
    assert set(repository.files("main")) == UPLOADED | set(mine)
    assert "kohya/lora_kohya.safetensors" in repository.files(repository.history("main")[1]["oid"])


def test_an_edited_card_is_published_as_it_is(hub: LoopbackHub, folder: Path) -> None:
    (folder / "README.md").write_text("# mine\n")
    assert "was edited" in push(hub, folder, "--hub_model_id", "owner/edited").stderr
    assert hub.repository("owner/edited").read("README.md") == b"# mine\n"


def test_a_branch_and_an_organisation(hub: LoopbackHub, folder: Path) -> None:
    push(hub, folder, "--hub_model_id", "lab/with-branch", "--hub_revision", "trial")
    repository = hub.repository("lab/with-branch")
    assert WEIGHTS in repository.files("trial") and WEIGHTS not in repository.files("main")
    expected = f'pipe.load_lora_weights("lab/with-branch", weight_name="{WEIGHTS}", revision="trial")'
    assert expected in repository.read("README.md", "trial").decode()


def test_a_hub_without_xet_gets_the_files_over_http(hub: LoopbackHub, folder: Path) -> None:
    done = push(hub, folder, "--hub_model_id", "owner/no-xet", HF_HUB_DISABLE_XET="0")
    assert "uploading over plain HTTP instead" in done.stderr
    assert hub.repository("owner/no-xet").read(WEIGHTS) == (folder / WEIGHTS).read_bytes()


def test_a_checkpoint_is_published_without_its_state(hub: LoopbackHub, folder: Path) -> None:
    push(hub, folder, "--hub_model_id", "owner/steps")
    checkpoint = folder / "checkpoint-5"
    (checkpoint / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4] + b"more")
    (checkpoint / "manifest.json").write_text("{}")
    push(hub, checkpoint, "--hub_model_id", "owner/steps", "--hub_revision", "checkpoint-5")
    repository = hub.repository("owner/steps")
    assert 'add `revision="checkpoint-5"`' in repository.read("README.md", "checkpoint-5").decode()
    files = hub.repository("owner/steps").files("checkpoint-5")
    assert set(files) == {".gitattributes", "README.md", WEIGHTS}
    assert hub.repository("owner/steps").read(WEIGHTS, "checkpoint-5") == (checkpoint / WEIGHTS).read_bytes()


def test_a_checkpoint_on_main_spares_what_is_not_of_a_run(hub: LoopbackHub, folder: Path) -> None:
    push(hub, folder, "--hub_model_id", "owner/steps-on-main")
    repository = hub.repository("owner/steps-on-main")
    header = {"key": "header", "value": {"summary": "by hand"}}
    repository.commit("main", [header, {"key": "file", "value": {"path": "LICENSE", "content": ""}}])
    checkpoint = folder / "checkpoint-5"
    (checkpoint / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (checkpoint / "manifest.json").write_text("{}")
    push(hub, checkpoint, "--hub_model_id", "owner/steps-on-main")
    assert set(repository.files("main")) == {".gitattributes", "README.md", WEIGHTS, "LICENSE"}
    card = repository.read("README.md").decode()
    assert "revision=" not in card and f'load_lora_weights("owner/steps-on-main", weight_name="{WEIGHTS}")' in card


@pytest.fixture(scope="session")
def taken(running_hub: LoopbackHub) -> None:
    store = running_hub.store
    store.create("models", "owner/public", private=False)
    repository = store.create("models", "owner/foreign", private=False)
    header = {"key": "header", "value": {"summary": "a model"}}
    repository.commit("main", [header, {"key": "file", "value": {"path": "model.safetensors", "content": ""}}])


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("taken")
def test_refused_before_anything_is_sent(hub: LoopbackHub, folder: Path, case: str) -> None:
    options, repo_id, expected = REFUSED[case]
    options = dict(options)
    flags = ["--hub_private_repo"] if options.pop("private", False) else []
    done = push(hub, folder, "--hub_model_id", repo_id, *flags, code=1, **options)
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert expected in done.stderr[done.stderr.index("error: ") :]
    assert not hub.requests("commit|objects/batch|PUT")


@pytest.mark.parametrize("case", PASSING)
def test_a_passing_fault_is_waited_out(hub: LoopbackHub, folder: Path, case: str) -> None:
    fault, name = PASSING[case], name_of(case)
    hub.fail(fault)
    push(hub, folder, "--hub_model_id", name)
    assert len(hub.repository(name).history("main")) == 2, "one commit, whatever went wrong"
    assert hub.repository(name).read(WEIGHTS) == (folder / WEIGHTS).read_bytes()
    # The fault did happen, and what was lost was not sent again: the second try found it there.
    assert len(hub.requests(fault["request"])) > fault["times"] - (fault["kind"] == "lost")


@pytest.mark.parametrize("case", LASTING)
def test_a_lasting_fault_ends_with_the_command_for_later(hub: LoopbackHub, folder: Path, case: str) -> None:
    (fault, expected), name, mine = LASTING[case], name_of(case), (folder / WEIGHTS).read_bytes()
    hub.fail(fault)
    done = push(hub, folder, "--hub_model_id", name, code=1)
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    assert expected in message, message
    assert message.rstrip().endswith(f"Publish it with\n  rlr-peft push {folder} --hub_model_id {name}")
    assert len(hub.repository(name).history("main")) == 1 and (folder / WEIGHTS).read_bytes() == mine
    assert "In the folder of this file" in (folder / "README.md").read_text(), "the card says what is true here"
    hub.fail()
    push(hub, folder, "--hub_model_id", name)
    assert hub.repository(name).read(WEIGHTS) == mine


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_hub_that_lacks_what_it_accepted_is_not_asked_the_same_again(
    hub: LoopbackHub, folder: Path, case: str
) -> None:
    (fault, expected), name = INCOMPLETE[case], name_of(case)
    hub.fail(fault)
    done = push(hub, folder, "--hub_model_id", name, code=1)
    (commit, _) = hub.repository(name).history("main")
    message = done.stderr[done.stderr.index("error: ") :]
    assert f"not published whole on {hub.endpoint}/{name}: Commit {commit['oid'][:8]} {expected}" in message, message
    assert "would find nothing changed and send nothing" in message and "Traceback" not in done.stderr
    again = f"rlr-peft push {folder} --hub_model_id {name}"
    assert f"\n  hf repos delete-files {name} {WEIGHTS} --revision main\n  {again}\n" in message
    # What the message says is so: the file is taken out, and the push sends it anew.
    hub.fail()
    delete = "import sys; from huggingface_hub import HfApi; HfApi().delete_file(sys.argv[2], sys.argv[1])"
    run(["-c", delete, name, WEIGHTS], hub.environment())
    push(hub, folder, "--hub_model_id", name)
    assert hub.requests("POST .*/commit/") and hub.repository(name).read(WEIGHTS) == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("flag", ["--hub_model_id", "--hub_revision", ""])
def test_an_empty_name_is_an_error(hub: LoopbackHub, folder: Path, flag: str) -> None:
    words = [folder, flag, ""] if flag else [""]
    done = run([*PUSH, *words], hub.environment(), 2)
    what = f"{flag[2:]}: expected a text" if flag else "expected a name or a path"
    assert f"error: {what}, got an empty one" in done.stderr and not hub.requests()


def test_an_empty_name_in_the_runs_config_is_an_error(hub: LoopbackHub, folder: Path) -> None:
    (folder / "config.yaml").write_text("hub_model_id: ''\n")
    assert "config.yaml: hub_model_id: expected a text, got ''" in push(hub, folder, code=1).stderr
    assert not hub.requests()


def test_the_documents_table_is_that_of_these_tests() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == with_table(document), "run python -m tests.hub.cases"


def test_an_adapter_is_merged_from_the_hub(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    """What is on the Hub here is no real adapter: that it is looked for and fetched is what shows."""
    push(hub, folder, "--hub_model_id", "owner/to-merge")
    words = ["--base", "tiny-shapes", "--output", tmp_path / "merged", "--adapter", "owner/to-merge"]
    done = run(["-m", "rlr_peft", "merge", *words], hub.environment(), 1)
    assert "The adapter owner/to-merge: expected LoRA weights, got unet.x.lora_A.weight in int32" in done.stderr


def test_a_hub_that_does_not_answer_is_given_up(hub: LoopbackHub, folder: Path) -> None:
    """The client itself has no time limit; ours is shortened here from two minutes to a third of a second."""
    impatient = folder.parent / "program.py"
    impatient.write_text(
        "import httpx2, runpy, sys\nimport rlr_peft.publishing.hub_client as client\n"
        "client.TIMEOUT, client.BACKOFF_SECONDS = httpx2.Timeout(0.3), 0.01\n"
        "runpy.run_module('rlr_peft', run_name='__main__')\n"
    )
    words = [impatient, "push", folder, "--hub_model_id", "owner/silent"]
    hub.fail({"request": WHOAMI, "kind": "slow", "seconds": 20})
    done = run(words, hub.environment(), 1)
    assert "cannot be reached (ReadTimeout" in done.stderr and len(hub.requests(WHOAMI)) == 5


def test_a_full_disk_here(hub: LoopbackHub, folder: Path) -> None:
    """The copy that is downloaded to be compared does not fit; real limits of the operating system."""
    limited = folder.parent / "limited.py"
    limited.write_text(
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "runpy.run_module('rlr_peft', run_name='__main__')\n"
    )
    environment = hub.environment()
    done = run([limited, "push", folder, "--hub_model_id", "owner/full"], environment, 1)
    assert "The adapter was published on" in done.stderr and "was not published" not in done.stderr
    assert "was accepted, but" in done.stderr and "File too large" in done.stderr
    assert f"rlr-peft push {folder} --hub_model_id owner/full" in done.stderr
    assert hub.repository("owner/full").read(WEIGHTS) == (folder / WEIGHTS).read_bytes()


def test_a_hub_that_stays_silent_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """Of the client's calls this one puts no limit in the place of ours."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        script = (
            "from rlr_peft.publishing import hub_client\n"
            "hub_client.TRIES, hub_client.TIMEOUT_SECONDS = 1, 0.3\n"
            "hub_client.model_info(hub_client.hub_api('hf_token'), 'owner/name')"
        )
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        done = completed(["-c", script], os.environ | endpoint, LIBRARIES)
    assert "ReadTimeout" in done.stderr
