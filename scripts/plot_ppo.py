"""The course of a PPO run as a picture.

python scripts/plot_ppo.py outputs/runs/ppo_smollm2/RUN/stages/ppo/metrics.jsonl docs/ppo_smollm2.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

_SMOOTH = 3  # rollouts of the moving mean


def rollouts_of(path: Path) -> list[dict[str, float]]:
    """The rows of a log that tell of a rollout: those of the step that wrote it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if "objective/scores" in row]


def smoothed(values: list[float]) -> list[float]:
    """Mean of each value with those just before it."""
    windows = [values[max(0, i - _SMOOTH + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def line(axes: Any, x: list[float], y: list[float], label: str) -> None:
    """A course: its values as points, its moving mean as a line."""
    (drawn,) = axes.plot(x, smoothed(y), label=label, linewidth=2)
    axes.plot(x, y, "o", color=drawn.get_color(), alpha=0.4, markersize=4)


def draw(rows: list[dict[str, float]], out: Path) -> None:
    """Rewards, KL, rewards against KL, and what the responses are like."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    number = [float(i) for i in range(len(rows))]
    kl = [row["objective/kl"] for row in rows]
    names = sorted(
        key for key in rows[0] if key.startswith("rewards/") and key.endswith("/mean")
    ) or ["objective/scores"]
    figure, ((reward, distance), (against, shape)) = pyplot.subplots(2, 2, figsize=(10, 7))
    for name in names:
        line(reward, number, [row[name] for row in rows], name)
    reward.set(xlabel="rollout", ylabel="mean over the rollout", title="reward")
    line(distance, number, kl, "objective/kl")
    distance.set(xlabel="rollout", ylabel="nats a response", title="KL from the reference")
    course = against.scatter(
        kl, [row["objective/scores"] for row in rows], c=number, cmap="viridis"
    )
    figure.colorbar(course, ax=against, label="rollout")
    against.set(xlabel="KL, nats a response", ylabel="objective/scores", title="proxy against KL")
    line(shape, number, [row["objective/entropy"] for row in rows], "entropy, nats a response")
    line(shape, number, [row["response/length_mean"] for row in rows], "length, tokens")
    shape.set(xlabel="rollout", title="responses")
    for axes in (reward, distance, shape):
        axes.legend(frameon=False)
    for axes in figure.axes[:4]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Draw a log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a PPO stage")
    parser.add_argument("out", type=Path, help="picture to write")
    given = parser.parse_args()
    draw(rollouts_of(given.metrics), given.out)


if __name__ == "__main__":
    main()
