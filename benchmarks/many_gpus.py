"""How updates would scale to many GPUs: a model on paper, from the measured parts of one GPU. Nothing here was run.

    python -m benchmarks.many_gpus

Reads what one GPU took for an update of two samples (``results/real_run.json``) and the size of an adapter's gradient
(``results/memory_plans.json``). What travels in an update is counted by ``tests/training/test_communication.py``.
Prints the tables of ``docs/scaling.md``.
"""

import json
from pathlib import Path

RESULTS = Path("benchmarks/results")
# Between machines: one link of 200 Gbit/s for every GPU, and what a message waits there, in bytes/s and seconds.
BANDWIDTH, LATENCY = 25e9, 20e-6
# Exchanges of an update besides the gradient's sum: prompts, rewards and the estimator's numbers.
EXCHANGES = 7
SAMPLES = 2  # of a GPU at once
ALL_SAMPLES = 1024  # of an update that is shared out
GPUS = (8, 64, 512)
# Case of the measurement, that of the plan, and how it is called.
BASES = (
    ("stable-diffusion-1.5-512", "SD1.5, 512", "SD1.5, 512 pixels"),
    ("stable-diffusion-xl-1024", "SDXL, 1024", "SDXL, 1024 pixels"),
)
METHODS = ("truncated-bp, K = 1", "full-bp, K = T", "nft")
# Noise scales between which those of tiny-shapes lay, in samples.
NOISE_SCALES = (60, 1700)


def main() -> None:
    """Prints the tables."""
    measured = json.loads((RESULTS / "real_run.json").read_text())["cases"]
    planned = json.loads((RESULTS / "memory_plans.json").read_text())["cases"]
    print("| base, method | gradient | one GPU |" + "".join(f" {count} GPUs |" for count in GPUS))
    print("|---" * (3 + len(GPUS)) + "|")
    for case, plan, name in BASES:
        parts = {part["name"]: part["bytes"] for part in planned[plan]["parts"]}
        gradient = parts["LoRA gradients (fp32)"]
        for method in METHODS:
            if method not in measured[case]["updates"]:
                continue
            seconds = measured[case]["updates"][method]["seconds"]
            cells = []
            for count in GPUS:
                sent = exchange_seconds(count, gradient)
                rounds = max(1.0, ALL_SAMPLES / SAMPLES / count)
                weak, strong = (work * seconds / (work * seconds + sent) for work in (1, rounds))
                cells.append(f"{1e3 * sent:.3g} ms: {weak:.1%}, {strong:.1%}")
            print(f"| {name}, `{method}` | {gradient / 1e6:.1f} MB | {seconds:.2f} s | {' | '.join(cells)} |")
    print("\n| samples of an update | " + " | ".join(f"N = {scale}" for scale in NOISE_SCALES) + " |\n|---|---|---|")
    for count in (1, *GPUS):
        samples = SAMPLES * count
        shares = [samples / (samples + scale) for scale in NOISE_SCALES]
        print(
            f"| {samples} ({count} GPU{'s' if count > 1 else ''}) | {' | '.join(f'{share:.0%}' for share in shares)} |"
        )


def exchange_seconds(count: int, gradient: float) -> float:
    """What the exchanges of an update take as rings over all GPUs, which is the slowest way.

    A sum of n bytes in a ring sends each of them on ``2 (P - 1) / P`` times, in ``2 (P - 1)`` messages, one after the
    other; a collection takes ``P - 1``.
    """
    hops = count - 1
    reduced = 2 * hops / count * gradient / BANDWIDTH + 2 * hops * LATENCY
    return reduced + EXCHANGES * hops * LATENCY


if __name__ == "__main__":
    main()
