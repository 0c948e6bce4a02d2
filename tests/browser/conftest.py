"""A site made from written records, and a browser to look at it with."""

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.report import build_report
from evals.results import EvalResult, Score
from reward.store import write_json

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
QUANTIZERS = {"int8": (0.02, 140.0), "nf4": (0.10, 90.0), "gguf_q8_0": (0.01, 150.0)}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms of two experiments, two seeds of one, three quantizers, held-out text, footprints, logs."""
    folder = tmp_path_factory.mktemp("browser")
    write_runs(folder / "runs")
    build_report(folder / "runs", folder / "site")
    return folder / "site"


def write_runs(runs: Path) -> None:
    """The records of the fixture `site`."""
    for name, experiment, arm, seed, better, worse in (
        ("a0", "demo", "low", 0, 0.2, 0.02),
        ("a1", "demo", "low", 1, 0.25, 0.03),
        ("b", "demo", "high", 0, 0.5, 0.3),
        ("c", "other <b>", "hostile", 0, 0.05, 0.0),
    ):
        Writer(runs / name, seed).run(experiment, arm, better, worse)


class Writer:
    """Writes one run whose answers are drawn with the seed; the base answers are the same in every run."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.evaluations: list[dict[str, str]] = []

    def run(self, experiment: str, arm: str, better: float, worse: float) -> None:
        """Write everything; `better` and `worse` are shares of documents that move up and down."""
        drawn = random.Random(f"{arm}{self.seed}")
        base = {task: self.marks(task) for task in ("json", "arc", "piqa", "hellaswag")}
        tuned = {
            task: [
                float(drawn.random() >= worse)
                if mark
                else float(task == "json" and drawn.random() < better)
                for mark in marks
            ]
            for task, marks in base.items()
        }
        self.tasks("base", "none", base)
        self.tasks("dpo", "none", tuned)
        self.text("base", "none", 0.0)
        self.text("dpo", "none", 0.02)
        self.footprint("dpo", "none", 260.0)
        for name, (share, size) in QUANTIZERS.items():
            flipped = {
                task: [1 - m if drawn.random() < share else m for m in marks]
                for task, marks in tuned.items()
            }
            self.tasks("dpo", name, flipped)
            self.text("dpo", name, share / 4)
            self.footprint("dpo", name, size)
        self.record(experiment, arm)

    def marks(self, task: str) -> list[float]:
        """The base's marks on a task."""
        return [float(random.Random(f"{task}{i}").random() < 0.4) for i in range(120)]

    def tasks(self, policy: str, quantizer: str, marks: Mapping[str, Sequence[float]]) -> None:
        """One gain suite of generated answers, one retention suite of multiple choice."""
        gain = [generated(i, mark, policy) for i, mark in enumerate(marks["json"])]
        self.result(policy, quantizer, "task", "gain", {"json": gain})
        kept = {task: values for task, values in marks.items() if task != "json"}
        rows = {task: [choice(i, m) for i, m in enumerate(values)] for task, values in kept.items()}
        self.result(policy, quantizer, "general", "retention", rows)

    def text(self, policy: str, quantizer: str, loss: float) -> None:
        """Loss on 40 documents; its divergence where the policy is not the base."""
        rows = []
        for i in range(40):
            value = 2 + 0.01 * (i % 7) + loss * (1 + 0.1 * (i % 3))
            kl = {} if policy == "base" else {"kl": loss / 2 + 0.001 * (i % 5)}
            weighted = {
                "loss": [value * 100, 100, "mean"],
                "perplexity": [-value * 100, 100, "perplexity"],
            }
            text = {"prompt": f"A document {i}.", "metrics": {}, "weighted": weighted}
            rows.append(sample(i, text | {"kl": kl}))
            rows[-1]["weighted"] |= {name: [one * 100, 100, "mean"] for name, one in kl.items()}
        mean = sum(row["weighted"]["loss"][0] for row in rows) / 4000
        scores = [
            Score("wiki", "loss", mean, 0.01, 40, False, True),
            Score("wiki", "perplexity", math.exp(mean), 0.1, 40, False, False),
        ]
        if policy != "base":
            kl_mean = sum(row["weighted"]["kl"][0] for row in rows) / 4000
            scores += [
                Score("wiki", "kl", kl_mean, 0.001, 40, False, False, neutral=0.0),
                Score("wiki", "kl_p99", kl_mean * 4, math.nan, 40, False, False, neutral=0.0),
            ]
        reference = {"path": "tiny", "quantizer": "none"}
        if quantizer != "none":
            reference["path"] = "dpo"
        self.save(policy, quantizer, "text", "retention", {"wiki": rows}, scores, reference)

    def footprint(self, policy: str, quantizer: str, size: float) -> None:
        """What it takes to run the model."""
        values = {"size_mb": size, "peak_mb": size * 1.3, "decode_tokens_per_s": 4000 / size}
        scores = [
            Score("footprint", name, value, math.nan, 1, name[0] == "d", name == "size_mb")
            for name, value in values.items()
        ]
        self.save(policy, quantizer, "footprint", "cost", {}, scores)

    def result(
        self, policy: str, quantizer: str, suite: str, role: str, tasks: Mapping[str, list[Any]]
    ) -> None:
        """A suite whose tasks have the metric `acc`."""
        scores = []
        for task, rows in tasks.items():
            mean = sum(row["metrics"]["acc"] for row in rows) / len(rows)
            error = math.sqrt(mean * (1 - mean) / (len(rows) - 1))
            scores.append(Score(task, "acc", mean, error, len(rows), True, True))
        self.save(policy, quantizer, suite, role, tasks, scores)

    def save(
        self,
        policy: str,
        quantizer: str,
        suite: str,
        role: str,
        tasks: Mapping[str, list[Any]],
        scores: list[Score],
        reference: dict[str, Any] | None = None,
    ) -> None:
        """A result folder, and its line of the run's record."""
        path = f"evals/{policy}-{quantizer}-{suite}"
        folder = self.folder / path
        folder.mkdir(parents=True)
        for task, rows in tasks.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"samples_{task}.jsonl").write_text("".join(lines), "utf-8")
        EvalResult(
            model={"path": "tiny" if policy == "base" else policy, "weights": "org/tiny@abc"},
            quantizer=quantizer,
            suite=suite,
            role=role,
            settings={"suite": suite},
            scores=scores,
            samples={task: f"samples_{task}.jsonl" for task in tasks},
            provenance={},
            reference=None if policy == "base" else reference,
        ).save(folder)
        self.evaluations.append(
            {"policy": policy, "quantizer": quantizer, "suite": suite, "path": path}
        )

    def record(self, experiment: str, arm: str) -> None:
        """`run.json`, and the log of the stage with one row that is not finite."""
        log = self.folder / "stages/dpo/metrics.jsonl"
        log.parent.mkdir(parents=True)
        rows: list[dict[str, Any]] = [
            {
                "step": step,
                "loss": 0.69 * math.exp(-step / 400) + 0.02 * math.sin(step + self.seed),
                "rewards/margins": step / 300,
                "rewards/accuracies": 1 - 0.5 * math.exp(-step / 90),
            }
            for step in range(1, 601)
        ]
        rows += [
            {"step": step, "eval_loss": 0.7 * math.exp(-step / 500)} for step in (200, 400, 600)
        ]
        rows.append({"step": 600, "loss": math.nan})
        log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        write_json(
            self.folder / "run.json",
            {
                "experiment": experiment,
                "title": "Written records, and a title of some length to see how it is broken",
                "label": f"dpo.args.beta={arm}",
                "arm": arm,
                "seed": self.seed,
                "margin": 0.03,
                "command": f"python -m align +experiment=demo dpo.args.beta={arm}",
                "started": f"2026-11-21T0{self.seed}:00:00+00:00",
                "seconds": 312.4,
                "model": {"path": "org/tiny", "dtype": "bfloat16"},
                "stages": [
                    {
                        "stage": "dpo",
                        "method": "lora",
                        "seconds": 81.0,
                        "data": {"source": "demo:preferences", "rows": 192},
                        "metrics": {"eval_loss": 0.21},
                        "parameters": {"trained": 4884480, "total": 134515008},
                    }
                ],
                "policies": ["base", "dpo"],
                "evaluations": self.evaluations,
                "provenance": {"commit": "abc", "versions": {"torch": "2.11"}},
            },
        )


def sample(number: int, fields: dict[str, Any]) -> dict[str, Any]:
    """A row of a samples file."""
    fields.pop("kl", None)
    return {"doc_id": number, "doc_hash": f"{number:08x}", "target": "", **fields}


def generated(number: int, mark: float, policy: str) -> dict[str, Any]:
    """A generated answer; every tenth is foreign code."""
    text = HOSTILE if number % 10 == 0 else f"The answer of {policy} to {number} is {mark:g}."
    prompt = {"kind": "generate_until", "prompt": f"Question {number}? {HOSTILE}", "target": "1"}
    return sample(number, prompt | {"answer": text, "metrics": {"acc": mark}})


def choice(number: int, mark: float) -> dict[str, Any]:
    """A document of multiple choice whose first option is right."""
    right, wrong = (-3.5, -9.25) if mark else (-9.25, -3.5)
    options = [" the right one", " the wrong one\nof two lines"]
    answer = f"{right:.3f} {options[0]}\n{wrong:.3f} {options[1]}"
    fields = {"kind": "multiple_choice", "prompt": f"Choose {number}:", "answer": answer}
    picked = {"options": options, "picked": {"acc": int(mark == 0)}, "metrics": {"acc": mark}}
    return sample(number, fields | picked | {"target": "0"})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The machine's chromium; a test without one is skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found[0],
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


class Watched:
    """A page and what it asked for and complained of."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))


@pytest.fixture
def watch(browser: Any) -> Iterator[Any]:
    """Opens a page; at the end nothing may have been fetched but files, and nothing complained of."""
    opened: list[Watched] = []

    def open_page(path: Path, **options: Any) -> Any:
        opened.append(Watched(browser, **options))
        opened[-1].page.goto(path.as_uri())
        return opened[-1].page

    yield open_page
    for one in opened:
        one.context.close()
        assert [url for url in one.requests if not url.startswith(("file://", "data:"))] == []
        assert one.complaints == []
