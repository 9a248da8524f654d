"""The licence of a base on the Hub, read from its card there."""

import json

from tests.hub.processes import LoopbackHub, run

CODE = """
import dataclasses, json
from huggingface_hub import HfApi
from rlr_peft.publishing.record import base_license
api = HfApi()
api.create_repo("owner/base")
card = b"---\\nlicense: other\\nlicense_name: mine\\nlicense_link: LICENSE.md\\n---\\n"
api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="owner/base")
api.create_repo("owner/without-card")
print(json.dumps([dataclasses.asdict(base_license(f"owner/{name}")) for name in ("base", "without-card", "nowhere")]))
"""


def test_the_bases_card_on_the_hub_says_the_licence(hub: LoopbackHub) -> None:
    done = run(["-c", CODE], hub.environment())
    unknown = {"id": None, "name": None, "link": None}
    link = "https://huggingface.co/owner/base/blob/main/LICENSE.md"
    assert json.loads(done.stdout) == [{"id": "other", "name": "mine", "link": link}, unknown, unknown]
