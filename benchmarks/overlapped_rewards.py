"""Training with a slow reward server, asked while the next micro-batch is sampled and one after the other.

    python -m benchmarks.overlapped_rewards

(five minutes on two busy cores) writes ``benchmarks/results/overlapped_rewards.json``, which `docs/rewards.md` quotes.
"""

import json
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from benchmarks.machine import write_results
from rlr_peft.build import build_run
from rlr_peft.config import load_config
from rlr_peft.training import train

SECONDS_OF_AN_ANSWER = 2.5
ROUNDS = 3
OPTIONS = """--config benchmarks/laboratory.yaml --estimator awm --step_kind ode --num_inference_steps 10
--train_batch_size 4 --gradient_accumulation_steps 4 --num_images_per_prompt 4 --max_train_steps 2""".split()


class Judge(BaseHTTPRequestHandler):
    """Scores an image by the length of its file, slowly."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(SECONDS_OF_AN_ANSWER)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": [-len(image) / 1000 for image in request["image"]]}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def trained(url: str, overlaps: bool) -> tuple[float, bytes]:
    """Seconds of training, and the adapter's weights."""
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(load_config([*OPTIONS, "--reward_fn", url, "--output_dir", folder]))
        run.reward.overlaps = overlaps
        started = time.perf_counter()
        train(run)
        seconds = time.perf_counter() - started
    return seconds, b"".join(weight.detach().numpy().tobytes() for weight in run.chain.parameters)


def main() -> None:
    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        rounds = [(trained(url, True), trained(url, False)) for _ in range(ROUNDS)]  # in turn: the machine may be busy
        server.shutdown()
    overlapped, sequential = (min(seconds for seconds, _ in runs) for runs in zip(*rounds, strict=True))
    results = {
        "options": OPTIONS,
        "seconds_of_an_answer": SECONDS_OF_AN_ANSWER,
        "seconds": {"overlapped": round(overlapped, 1), "sequential": round(sequential, 1)},
        "same_weights": len({weights for runs in rounds for _, weights in runs}) == 1,
    }
    print(json.dumps(results, indent=2))
    print(f"Wrote {write_results('overlapped_rewards', results)}")


if __name__ == "__main__":
    main()
