"""May this token write to that repository? Asked before training, with nothing written but an empty repository."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from rlr_peft.durable_files import stays_inside
from rlr_peft.publishing.hub_client import PASSING_ERRORS, HubError, hub_api, in_words, model_info, patiently
from rlr_peft.redaction import redacted_address

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
TOKEN_PAGE = "https://huggingface.co/settings/tokens"
# What a repository holds at its top level if it is some other model.
FOREIGN_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".gguf", ".pt", ".pth")
FOREIGN_NAMES = ("model_index.json", "config.json", "adapter_config.json")


@dataclass(frozen=True)
class Destination:
    """Where a run is published; the token may write there.

    Attributes:
        api: the client, with the token.
        repo_id: `owner/name`.
        revision: the branch.
        token: given by the user; None where the client finds its own.
    """

    api: HfApi = field(repr=False)
    repo_id: str
    revision: str
    token: str | None = field(repr=False, default=None)

    @property
    def url(self) -> str:
        """Of the page that shows the adapter."""
        is_main = self.revision == constants.DEFAULT_REVISION
        return redacted_address(f"{self.api.endpoint}/{self.repo_id}") if is_main else self.tree(self.revision)

    def tree(self, revision: str) -> str:
        """Of the page that lists the files of a branch or commit."""
        return redacted_address(f"{self.api.endpoint}/{self.repo_id}/tree/{revision}")


def open_destination(
    repo_id: str, *, token: str | None = None, private: bool = False, revision: str | None = None
) -> Destination:
    """Checks the token and its rights, and creates the repository and the branch where they are missing.

    Args:
        repo_id: `owner/name`, or a name alone for the token's own user.
        token: None takes that of `HF_TOKEN` or `hf auth login`.
        private: create a private repository; one that exists must be private.
        revision: branch to publish on; None means main.

    Raises:
        HubError: no token, a token that the Hub refuses or that may only read, a repository of somebody else, a name
            that is taken by another model, an existing repository that is public but should be private, or no Hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"hub_model_id: expected `owner/name` or `name`, got {repo_id}; choose another --hub_model_id. {error}"
        ) from None
    if revision is not None and not stays_inside(revision):
        raise HubError(f"hub_revision: expected the name of a branch, got {revision!r}; choose another --hub_revision.")
    api = hub_api(token)
    try:
        me = _who_asks(api, token)
        full = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        _check_owner(full, me)
        _create(api, full, private)
        branch = revision or constants.DEFAULT_REVISION
        if branch != constants.DEFAULT_REVISION:
            patiently(lambda: api.create_branch(full, branch=branch, exist_ok=True))
        _probe(api, full, branch)
    except (HfHubHTTPError, OfflineModeIsEnabled, *PASSING_ERRORS) as error:
        raise HubError(f"Nothing was published: {in_words(error)}") from error
    return Destination(api, full, branch, token)


def _who_asks(api: HfApi, token: str | None) -> dict[str, Any]:
    if token is None and get_token() is None:
        raise HubError(
            f"Publishing needs an access token with the right to write, and there is none: make one at {TOKEN_PAGE} "
            "and give it by `hf auth login`, by the environment variable HF_TOKEN, or by --hub_token."
        )
    try:
        me: dict[str, Any] = patiently(api.whoami)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise HubError(
                f"The Hub at {api.endpoint} refused the access token: it is mistyped, expired or revoked. Make a new "
                f"one at {TOKEN_PAGE}."
            ) from error
        raise
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"The access token of {me['name']} may only read: make one with the right to write at {TOKEN_PAGE}."
        )
    return me


def _check_owner(repo_id: str, me: dict[str, Any]) -> None:
    owner = repo_id.split("/")[0]
    roles = {one["name"]: one.get("roleInOrg") for one in me.get("orgs", ())}
    if owner != me["name"] and owner not in roles:
        places = ", ".join([me["name"], *roles])
        raise HubError(
            f"The token of {me['name']} cannot write to {repo_id}: expected a repository of {places}, got one of "
            f"{owner}. Change --hub_model_id, or use a token of {owner}."
        )
    if roles.get(owner) == "read":
        raise HubError(
            f"{me['name']} may only read in the organisation {owner}, so {repo_id} cannot be written: ask its admins "
            "for the right to write, or change --hub_model_id."
        )


def _create(api: HfApi, repo_id: str, private: bool) -> None:
    patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    info = model_info(api, repo_id)
    if private and not info.private:
        raise HubError(
            f"{repo_id} exists and is public, but --hub_private_repo asks for a private one: change its visibility in "
            "its settings, or choose another --hub_model_id."
        )
    top = [one.rfilename for one in info.siblings or () if "/" not in one.rfilename]
    foreign = [
        name
        for name in top
        if name != WEIGHT_NAME and (name in FOREIGN_NAMES or PurePosixPath(name).suffix in FOREIGN_SUFFIXES)
    ]
    if foreign:
        raise HubError(
            f"The name {repo_id} is taken by another model (it holds {', '.join(sorted(foreign)[:3])}), which would be "
            "mixed with this adapter: choose another --hub_model_id."
        )


def _probe(api: HfApi, repo_id: str, branch: str) -> None:
    """Asks how a file would be uploaded, which the Hub answers only to those who may write."""
    try:
        patiently(
            lambda: api.preupload_lfs_files(repo_id, [CommitOperationAdd(".gitattributes", b"")], revision=branch)
        )
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise HubError(
            f"The access token may not write to {repo_id}: give it the right to write there at {TOKEN_PAGE}, or change "
            "--hub_model_id."
        ) from error
