"""Sampled batches: what belongs to which prompt, antithetic noise, and servers that are asked meanwhile."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from rlr_peft.chain import DenoisingChain
from rlr_peft.errors import RewardError
from rlr_peft.estimators import Batch, DecodedReward, leave_one_out, mirrored_pairs, sample_batch
from rlr_peft.rewards import (
    CallableReward,
    HeldoutRewards,
    JpegReward,
    RemoteReward,
    RemoteSettings,
    Term,
    WeightedRewards,
)
from tests.pipelines import chain_over, tiny_stable_diffusion
from tests.programs import serving

PROMPTS = ["red"] * 4 + ["blue"] * 4


def sampled(micro_batch_size: int, antithetic: bool) -> tuple[DenoisingChain, Batch]:
    chain = chain_over(tiny_stable_diffusion(dtype=torch.float64), num_inference_steps=2, guidance_scale=3.0)
    reward = CallableReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
    reward.overlaps = True  # which one with a gradient cannot
    objective = DecodedReward(chain, reward, 4)
    return chain, sample_batch(chain, objective, PROMPTS, list(range(8)), micro_batch_size, antithetic)


def test_mirrored_pairs_are_neighbours() -> None:
    noises = torch.randn(3, 2, 4)
    pairs = mirrored_pairs(noises)
    assert pairs.shape == (3, 4, 4)
    for i in range(2):
        assert torch.equal(pairs[:, 2 * i], noises[:, i]) and torch.equal(pairs[:, 2 * i + 1], -noises[:, i])


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_antithetic_samples_have_the_noises_of_the_first_seed_of_their_pair(micro_batch_size: int) -> None:
    chain, batch = sampled(micro_batch_size, antithetic=True)
    assert batch.prompts == PROMPTS and batch.scored.scores.shape == (8,)
    noises = torch.cat([trajectory.noises for trajectory, _ in batch.micro_batches], dim=1)
    assert torch.equal(noises[:, ::2], chain.draw_noises([0, 2, 4, 6]))
    assert torch.equal(noises[:, 1::2], -noises[:, ::2])
    advantages = leave_one_out(batch.scored.scores, 4, antithetic=True)
    pairs = batch.scored.scores.reshape(2, 2, 2)
    others = pairs.flip(1).mean(2, keepdim=True)
    torch.testing.assert_close(advantages, (pairs - others).flatten(), msg="the partner's noise is the sample's own")
    parts = [rollout.rewards for rollout in batch.rollouts]
    assert [len(part) for part in parts] == [micro_batch_size] * (8 // micro_batch_size)
    assert torch.equal(torch.cat(parts), batch.rewards)


def test_the_size_of_a_micro_batch_changes_nothing() -> None:
    for antithetic in (False, True):
        (_, small), (_, large) = sampled(2, antithetic), sampled(8, antithetic)
        torch.testing.assert_close(small.scored.scores, large.scored.scores)
        parts = [measured.reward_gradient for _, measured in small.micro_batches]
        ((_, whole),) = large.micro_batches
        assert len(parts) == 4
        torch.testing.assert_close(torch.cat(parts), whole.reward_gradient)


class SlowServer(HTTPServer):
    """Keeps the first answer back until ``go_on`` is set; scores an image by the length of its file.

    Attributes:
        patience: seconds that it waits at most.
        asked: prompts of the requests, in their order.
        waited_in_vain: whether the time was over.
    """

    patience = 30.0

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.go_on = threading.Event()
        self.waited_in_vain = False
        super().__init__(("127.0.0.1", 0), _Judge)


class _Judge(BaseHTTPRequestHandler):
    server: SlowServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request["prompt"])
        if not self.server.go_on.wait(self.server.patience):
            self.server.waited_in_vain = True
            self.server.go_on.set()
        odd = "bad" in request["prompt"]
        answer = {"error": "cannot judge this"} if odd else {"rewards": [len(image) for image in request["image"]]}
        self.send_response(422 if odd else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SlowServer]:
    with serving(SlowServer()) as server:
        yield server


class CountingChain:
    """Lets the server go on once the second micro-batch is being sampled."""

    def __init__(self, server: SlowServer) -> None:
        self.chain = chain_over(tiny_stable_diffusion(), num_inference_steps=2)
        self.server, self.sampled = server, 0

    def sample(self, *arguments: object) -> object:
        self.sampled += 1
        if self.sampled == 2:
            self.server.go_on.set()
        return self.chain.sample(*arguments)


def asked_of(server: SlowServer, overlaps: bool, prompts: list[str], heldout: bool = False) -> Batch:
    """Two micro-batches scored by the server and a JPEG's size, in two requests each."""
    chain = CountingChain(server)
    remote = RemoteReward(f"http://127.0.0.1:{server.server_port}", RemoteSettings(batch_size=2, retries=0))
    remote.overlaps = overlaps
    reward = WeightedRewards([Term(remote, 1.0), Term(JpegReward(True), 0.5)], "none")
    both = HeldoutRewards([JpegReward(True), CallableReward("mean", lambda images, prompts: images.mean((1, 2, 3)))])
    objective = DecodedReward(chain.chain, reward, 2, both if heldout else None, limit=1135.0)
    batch = sample_batch(chain, objective, prompts, list(range(len(prompts))), 4)
    return batch


def test_a_server_is_asked_while_the_next_micro_batch_is_sampled_and_nothing_changes(server: SlowServer) -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    overlapped = asked_of(server, True, prompts, heldout=True)
    assert not server.waited_in_vain, "the first answer came while the second micro-batch was sampled"
    server.go_on.clear()
    server.patience = 0.05
    sequential = asked_of(server, False, prompts, heldout=True)
    assert server.waited_in_vain, "without overlap the second micro-batch waits for the first answer"
    assert server.asked[:4] == server.asked[4:] == [prompts[i : i + 2] for i in range(0, 8, 2)]
    assert torch.equal(overlapped.rewards, sequential.rewards) and (overlapped.rewards == 1135).any()
    for one, other in ((overlapped.scored, sequential.scored), (overlapped.heldout, sequential.heldout)):
        assert torch.equal(one.scores, other.scores) and one.logged.keys() == other.logged.keys()
        assert all(torch.equal(values, other.logged[name]) for name, values in one.logged.items())


def test_a_server_that_refuses_ends_both_alike(server: SlowServer) -> None:
    server.go_on.set()
    messages = []
    for overlaps in (True, False):
        with pytest.raises(RewardError) as caught:
            asked_of(server, overlaps, ["fine", "fine", "fine", "bad", *["fine"] * 4])
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "422" in messages[0] and "cannot judge this" in messages[0]
