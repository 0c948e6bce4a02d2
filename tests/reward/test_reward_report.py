"""The report on a tiny reward model: its numbers against its own file of pairs, its page, and bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Data, Dtype, Paths, RewardReport, Scorer
from reward import heldpairs
from reward.assessment import _warning
from reward.heldpairs import Scores
from reward.model import RewardModel
from reward.report import made, summary
from reward.store import read_json

ROOT = Path(__file__).parents[2]


def head(tiny_model: Path, folder: Path, seed: int, scale: float = 1.0) -> Path:
    """The tiny model with a random scalar head, in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.score.weight.data *= scale
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("heads")
    return [head(tiny_model, folder / f"rm-{seed}", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 pairs, three to a prompt: not a multiple of any batch, and one is too long to be scored."""
    rows = [
        {
            "prompt": f"Question {at // 3}?",
            "chosen": f"Good {at} " + "yes " * (at % 5),
            "rejected": f"<b>Bad</b> {at} " + "no " * (at % 7),
            "subset": ("alpacaeval-easy", "hep-go", "mine")[at % 3],
        }
        for at in range(33)
    ]
    for row in rows[::2]:  # whatever a random model likes, it is wrong in some pairs
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    rows[5]["chosen"] = "long " * 300
    path = tmp_path_factory.mktemp("pairs") / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(model: Path, source: Path, root: Path, **more: Any) -> RewardReport:
    scorer = Scorer(str(model), batch_tokens=more.pop("batch_tokens", 1024))
    return RewardReport(scorer, Data(source=str(source)), paths=Paths(str(root)), **more)


@pytest.fixture(scope="module")
def folder(models: list[Path], source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    return made(asked(models[0], source, root, subset="subset", others=[str(models[1])]))


def test_numbers_are_those_of_the_pairs(folder: Path) -> None:
    report = read_json(folder / "report.json")
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    margins = [pair["margin"] for pair in pairs if pair["margin"] is not None]
    assert [pair["row"] for pair in pairs] == [f"test.jsonl:{at}" for at in range(1, 34)]
    assert pairs[5]["margin"] is None
    assert report["accuracy"]["value"] == sum(margin > 0 for margin in margins) / 32
    assert (report["accuracy"]["n"], report["accuracy"]["gaps"]) == (32, 1)
    assert report["accuracy"]["clusters"] == 11
    assert report["too_long"] == 1
    longer = [
        0.5
        + 0.5
        * ((p["chars_chosen"] > p["chars_rejected"]) - (p["chars_chosen"] < p["chars_rejected"]))
        for p in pairs
        if p["margin"] is not None
    ]
    assert report["length_baseline"]["value"] == pytest.approx(sum(longer) / 32)
    brier = sum((1 / (1 + math.exp(margin))) ** 2 for margin in margins) / 32
    assert report["brier"]["value"] == pytest.approx(brier)
    assert [one["margin"] for one in report["mistakes"]] == sorted(m for m in margins if m < 0)[:20]
    assert {one["name"]: one["accuracy"]["n"] for one in report["subsets"]} == {
        "alpacaeval-easy": 11, "hep-go": 11, "mine": 10,
    }  # fmt: skip
    assert [one["name"] for one in report["rewardbench"]["sections"]] == ["Chat", "Reasoning"]
    assert report["others"][0]["agreement"]["n"] == 32
    (other,) = report["others"]
    own, difference = report["accuracy"]["value"], other["difference"]
    assert difference["value"] == pytest.approx(own - other["accuracy"]["value"])  # the same gap
    assert (difference["n"], difference["clusters"]) == (32, 11)
    assert difference["ci_low"] < difference["value"] < difference["ci_high"]
    assert report["warning"] == ""  # 1 of 33 is below 5 %
    assert "warning" not in summary(report)
    assert report["mistakes"]
    assert len(report["inputs"]["model"]["weights"]) == 16
    assert "accuracy" in summary(report)


def test_a_gap_of_a_server_is_a_conversation_that_is_too_long() -> None:
    scores = [(1.0, math.nan), (1.0, 0.0), (math.nan, math.nan)]
    found = Scores(scores, tokens=None, max_length=None)
    assert found.too_long == 2
    assert _warning(found).endswith("(raise model.max_length where it is served)")


def test_page_is_whole_escaped_and_the_same_again(
    folder: Path, models: list[Path], source: Path, tmp_path: Path
) -> None:
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;Bad&lt;/b&gt;" in page
    assert "<b>Bad</b>" not in page
    assert page.count("<svg") == 4
    assert not {"http-equiv=refresh", "<script", "src="} & set(page.split())
    again = made(
        asked(
            models[0],
            source,
            tmp_path,
            subset="subset",
            others=[str(models[1])],
            out=str(tmp_path / "out"),
        )
    )
    assert (again / "report.html").read_text() == page
    assert (again / "pairs.jsonl").read_bytes() == (folder / "pairs.jsonl").read_bytes()


def test_accuracy_counts_pairs_not_batches(
    folder: Path, models: list[Path], source: Path, tmp_path: Path
) -> None:
    single = made(asked(models[0], source, tmp_path, batch_tokens=1))
    alone, together = (read_json(one / "report.json") for one in (single, folder))
    assert alone["accuracy"] == together["accuracy"]
    assert alone["subsets"] == []


def test_many_gaps_are_warned_of(models: list[Path], source: Path, tmp_path: Path) -> None:
    """Two of 33 pairs, 6 %, are too long; the numbers speak of the others."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[9]["rejected"] = "long " * 300
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = made(asked(models[0], path, tmp_path))
    report = read_json(folder / "report.json")
    first = summary(report).splitlines()[0]
    assert first.startswith("warning: 2 of 33 pairs (6.1 %) have no score")
    assert "with its prompt an answer is longer than" in first
    assert first.endswith("(raise model.max_length)")
    page = (folder / "report.html").read_text()
    assert page.index(report["warning"]) < page.index("In the right order")


def test_command(models: list[Path], source: Path, tmp_path: Path) -> None:
    argv = [
        f"model.path={models[0]}",
        f"data.source={source}",
        f"paths.root={tmp_path}",
        "offline=true",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "reward.report", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "32 pairs of 11 prompts, 1 without a score" in done.stdout
    assert Path(done.stdout.splitlines()[-1]).is_file()


def test_bad_input_is_answered(
    models: list[Path], tiny_model: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Did you mean 'subset'"):
        made(asked(models[0], source, tmp_path, subset="subsett"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        made(asked(models[0], empty, tmp_path))
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="needs pairs of a chosen and a rejected answer"):
        made(asked(models[0], chats, tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="no earlier report"):
        made(asked(models[0], source, tmp_path, out=str(tmp_path / "mine")))
    broken = head(tiny_model, tmp_path / "broken", 1, math.nan)
    with pytest.raises(UserError, match="are not finite: its weights hold NaN"):
        made(asked(broken, source, tmp_path))
    config = asked(models[0], source, tmp_path)
    config.model.max_length = 4
    with pytest.raises(UserError, match="none of the 33 pairs: each has an answer that"):
        made(config)
    assert not list((tmp_path / "rewards").glob("[!.]*"))


@pytest.mark.parametrize(
    ("options", "others", "message"),
    [
        ({"max_length": 9}, [], "max_length: the options of a model at an address"),
        (
            {"dtype": Dtype.bfloat16, "batch_tokens": 9},
            ["http://y"],
            "dtype, batch_tokens: the opt",
        ),
        ({"revision": "v1"}, ["./absent"], "revision: the options of a model at an address"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: dict[str, Any], others: list[str], message: str, source: Path, tmp_path: Path
) -> None:
    config = RewardReport(Scorer("http://x", **options), Data(source=str(source)), others=others)
    with pytest.raises(UserError, match=message):
        made(config)


def test_a_conversation_is_tokenized_once(
    models: list[Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, tokenize = [], RewardModel.tokenize

    def counted(self: RewardModel, *row: Any) -> list[int]:
        seen.append(row)
        return tokenize(self, *row)

    monkeypatch.setattr(RewardModel, "tokenize", counted)
    records = heldpairs.read(Data(source=str(source)), tmp_path, None).records
    heldpairs.score(Scorer(str(models[0])), records)
    assert len(seen) == 2 * len(records)


@pytest.mark.parametrize(
    ("name", "pairs", "longer"), [("hh_harmless", 271, None), ("alpaca_judged", 497, 0.6)]
)
def test_real_pairs_load(
    shared_data: Path, tmp_path: Path, name: str, pairs: int, longer: float | None
) -> None:
    from reward.ordering import longest

    data = Data(source=str(shared_data / "preference" / f"{name}.test.jsonl.gz"))
    held = heldpairs.read(data, tmp_path, None)
    nothing = heldpairs.Scores([(0.0, 0.0)] * len(held.records), None, None)
    found = longest(heldpairs.as_pairs(held, nothing).chars).mean()
    assert len(held.records) == len(held.places) == pairs
    assert found > (longer or 0)
