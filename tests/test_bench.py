"""The arithmetic, the accounting and the refusals of `scripts/bench`."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from conf.entry import UserError

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
NAMES = ("answers", "counting", "curves", "evaluating", "inputs", "running", "table", "training")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark, which is a program and no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:  # none stays behind for other tests
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "counting", found["counting"])
    return SimpleNamespace(**found)


@pytest.fixture
def clock() -> ModuleType:
    """The clock, not installed: $BENCH_CLOCK is not set here."""
    spec = importlib.util.spec_from_file_location("bench_clock", BENCH / "clock/sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- tokens and operations ---


def test_tree_is_the_set_of_all_prefixes(bench: Any) -> None:
    drawn = random.Random(0)
    for _ in range(100):
        sequences = [
            [drawn.randrange(3) for _ in range(drawn.randrange(8))]
            for _ in range(drawn.randrange(1, 6))
        ]
        prefixes = {tuple(s[:stop]) for s in sequences for stop in range(1, len(s) + 1)}
        assert bench.counting.tree(sequences) == (len(prefixes), sum(map(len, prefixes)))


def test_tokens_of_a_pair(bench: Any) -> None:
    pair = [[1, 2, 3, 4, 5], [1, 2, 3, 6]]
    # 1 2 3 4: the last tokens, 5 and 6, are not read.
    count = bench.counting.tokens(pair, rows=1, padded=10, scored=3)
    assert count == bench.counting.Tokens(1, 10, 9, 4, 3, depths=1 + 2 + 3 + 4)
    # 1 2 3 4 5, 6: a reward model gives a score there.
    count = bench.counting.tokens(pair, rows=1, padded=10, scored=2, wants_last=True)
    assert count == bench.counting.Tokens(1, 10, 9, 6, 2, depths=1 + 2 + 3 + 4 + 5 + 4)
    assert (count + count).a_row() == "10 padded, 9 real, 6 required, 2 scored"


def test_operations_are_those_that_torch_counts(bench: Any, tiny_model: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    length = 40
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None]).logits.sum().backward()
    # Attention without blocks computes the whole square, so here each token "sees" all.
    count = bench.counting.Tokens(1, length, length, length, length, length**2)
    counted = bench.counting.flops(count, bench.inputs.shape(tiny_model))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)  # 1 %: the norms' weights


# --- ratios ---


def test_no_ratio_where_the_peer_is_unsteady(bench: Any) -> None:
    steady = bench.table.Measure("a", peer=[10.0, 10.9], ours=[5.0, 9.0])
    unsteady = bench.table.Measure("b", peer=[10.0, 11.1], ours=[5.0, 5.0])
    shown = bench.table.markdown([steady, unsteady], [], [])
    assert "| a | 10 | 5 | 2.00× |  |" in shown
    assert "| b | 10 | 5 | none: the peer's rounds differ by 11% |  |" in shown
    once = bench.table.markdown([bench.table.Measure("c", [8.0], [2.0])], [], [])
    assert "| c | 8 | 2 | 4.00×, one round |  |" in once


def test_goals_are_ratios_or_shares(bench: Any) -> None:
    goals = [bench.table.Goal("a", 4, 6), bench.table.Goal("b", 0.6, 0.4, is_share=True)]
    goals.append(bench.table.Goal("d", 2, 3))
    # A size is no time: the peer may hold more in one round than in another.
    measures = [
        bench.table.Measure("a", [45.0, 46.0], [9.0, 9.5]),
        bench.table.Measure("b", [2000.0, 3000.0], [1000.0], is_timed=False),
        bench.table.Measure("c", [8.0], [0.0], is_timed=False),
    ]
    assert bench.table.markdown(measures, goals, []).splitlines()[2:] == [
        "| a | 45 | 9 | **5.00×** | ≥ 4× (6×) |",
        "| b | 2,000 | 1,000 | **0.50** | ≤ 0.6 (0.4) |",
        "| c | 8 | 0 | none: nothing was measured |  |",
        "| d | | | none: not measured | ≥ 2× (3×) |",
    ]


def test_no_ratio_without_parity(bench: Any) -> None:
    shown = bench.table.markdown(
        [bench.table.Measure("a", [9.0], [3.0])], [], ["other losses", "other batches"]
    )
    assert "3.00" not in shown
    assert shown.endswith("- other losses\n- other batches")


def test_each_step_counts_by_its_least_round(bench: Any) -> None:
    rounds = [[9.0, 2.0, 8.0], [9.0, 3.0, 7.0]]  # the first step is left out
    runs = [
        bench.running.Run(clock=[{"kind": "step", "pid": 1, "cpu": cpu} for cpu in each])
        for each in rounds
    ]
    assert bench.training.least(runs, "cpu") == 2.0 + 7.0


# --- parity ---


def _trained(bench: Any, losses: list[float], last: int = 9) -> Any:
    clock = [{"kind": "loss", "pid": 7, "step": n, "loss": x} for n, x in enumerate(losses, 1)]
    clock += [{"kind": "step", "pid": 7, "sequences": [[1, last], [2]]}]
    return bench.running.Run(clock=[*clock, {"kind": "exit", "pid": 7, "threads": 1}])


@pytest.mark.parametrize(
    ("losses", "last", "said"),
    [
        ([0.6931, 0.68], 9, []),
        ([0.6931, 0.78], 9, ["step 2: the peer's loss is 0.6800, ours 0.7800"]),
        ([0.6931], 9, ["the peer logged [2] losses a training run, ours [1]"]),
        ([0.6931, 0.68], 8, ["step 1: the batches hold other sequences"]),
        ([0.6931, float("nan")], 9, ["step 2: the peer's loss is 0.6800, ours nan"]),
    ],
)
def test_parity_of_training(bench: Any, losses: list[float], last: int, said: list[str]) -> None:
    workload = bench.training.Training("", "dpo", ())
    prepared = bench.training.Prepared(workload, Path(), Path(), bench.counting.Shape(1, 1, 1, 1))
    runs = {"peer": [_trained(bench, [0.6931, 0.68])], "ours": [_trained(bench, losses, last)]}
    assert prepared.problems(runs) == said


def test_a_reference_that_is_not_the_start_is_found(bench: Any) -> None:
    workload = bench.training.Training("", "dpo", ())
    prepared = bench.training.Prepared(workload, Path(), Path(), bench.counting.Shape(1, 1, 1, 1))
    runs = {arm: [_trained(bench, [4.49])] for arm in ("peer", "ours")}
    assert prepared.problems(runs) == [
        f"the first loss of {side} is 4.4900, not ln 2: the reference is not the start"
        for side in ("the peer", "ours")
    ]


def test_only_rounding_may_change_an_answer(bench: Any) -> None:
    answers = bench.answers

    def peer(*likelihoods: float, lengths: list[int]) -> Any:
        sample = {"doc_id": 0, "filtered_resps": [[x, False] for x in likelihoods]}
        choices = ["x" * length for length in lengths]
        return answers.of_peer(sample | {"doc": {"choices": choices}, "acc": 1.0, "acc_norm": 0.0})

    def ours(acc: int, acc_norm: int, value: float = 1.0) -> Any:
        picked = {"acc": acc, "acc_norm": acc_norm}
        metrics = {"acc": value, "acc_norm": 0.0}
        return answers.of_ours({"doc_id": 0, "picked": picked, "metrics": metrics})

    def told(theirs: Any, own: Any, dtype: str = "bfloat16") -> int:
        return len(answers.differences("base", [theirs], [own], dtype))

    same = peer(-10.0, -20.0, lengths=[5, 10])  # -2 a character, both
    assert same.picked == {"acc": 0, "acc_norm": 0}
    assert told(same, ours(0, 0)) == told(same, ours(0, 1)) == 0
    assert told(same, ours(1, 0)) == 1  # ten nats are no rounding
    assert told(same, ours(0, 0, value=0.0)) == 1  # one option, and another verdict
    near = peer(-10.0, -10.9, lengths=[5, 5])  # either may be off by half a nat
    assert told(near, ours(1, 1)) == 0
    assert told(near, ours(1, 1), "float32") == 2
    assert told(peer(-10.0, -11.1, lengths=[5, 5]), ours(1, 0)) == 1
    other = answers.of_ours({"doc_id": 1, "picked": near.picked, "metrics": near.values})
    assert answers.differences("base", [near], [other], "bfloat16") == [
        "base: the two sides answered other questions"
    ]


# --- curves ---


def test_slope_of_a_line(bench: Any) -> None:
    points = [
        bench.curves.Point(
            x, {"peer": 1 + 3.0 * x, "ours": 1 + 0.5 * x}, {"peer": x, "ours": x}, 2, True
        )
        for x in (2, 4, 16)
    ]
    assert bench.curves.slope(points, "peer") == pytest.approx(3.0)
    shown = bench.curves.markdown(points, "options a question")
    assert "| 2 | 7.00 | 2.00 | 3.50× | 2 | 2 |" in shown
    assert shown.endswith("One more of options a question costs: peer 3 s, ours 0.5 s.")


# --- processes ---

_PARENT = """
import subprocess, sys
child = "held = bytearray(150 * 2**20); sum(range(5 * 10**6))"
sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
"""
# In a process of its own: the system counts what this one holds as its children's.
_MEASURE = """
import sys
from pathlib import Path
from running import run
found = run([[sys.executable, "-c", sys.argv[1]]], Path(sys.argv[2]), threads=1)
print(found.memory, found.cpu, found.wall)
"""


def test_children_count(tmp_path: Path) -> None:
    env = dict(os.environ) | {"PYTHONPATH": f"{BENCH}{os.pathsep}{BENCH.parents[1]}"}
    argv = [sys.executable, "-c", _MEASURE, _PARENT, str(tmp_path)]
    told = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
    memory, cpu, wall = map(float, told.split())
    assert 150 < memory < 200  # MiB of the grandchild
    assert cpu > 0.05
    assert wall > 0.05


def test_a_failure_is_told_with_its_output(bench: Any, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('no such dataset')"]
    with pytest.raises(UserError, match="ended with code 1:\nno such dataset"):
        bench.running.run([argv], tmp_path, threads=1)


def test_an_absent_peer_is_told(bench: Any) -> None:
    with pytest.raises(UserError, match="install the peer"):
        bench.running.program("no-such-peer")


_READS = """
import torch
words, positions = torch.nn.Embedding(50, 4), torch.nn.Embedding(20, 4)
words(torch.arange(6)), positions(torch.arange(6))
with torch.no_grad():
    words(torch.arange(3).expand(2, 3))
"""


def test_the_clock_counts_tokens_in_other_processes(bench: Any, tmp_path: Path) -> None:
    found = bench.running.run([[sys.executable, "-c", _READS]], tmp_path, threads=1)
    (row,) = found.of("exit")
    assert (row["trained"], row["reference"], row["threads"]) == (6, 6, 1)


def test_the_clock_describes_batches(clock: ModuleType) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = {"sequences": [[5, 6, 7], [8, 9]], "padded": 6}
    completion = torch.tensor([[0, 0, 1], [0, 1, 0]])
    labels = torch.tensor([[5, 6, 7], [-100, 9, -100]])  # nothing predicts the first token
    for more, scored in [({"completion_mask": completion}, 2), ({"labels": labels}, 3), ({}, 2)]:
        assert clock._described({"inputs": [batch | more]}) == found | {"scored": scored}
    assert clock._described({"inputs": [{"rows": ids}], "cpu": 1.0}) == {"cpu": 1.0}


# --- inputs ---


def test_options_are_added_and_taken_away(bench: Any, tmp_path: Path) -> None:
    source = tmp_path / "questions.jsonl"
    rows = [
        {"ctx": f"{n}?", "endings": [f"{n}{x}" for x in "abcd"], "label": str(n % 4)}
        for n in range(40)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (2, 4, 6):
        folder = bench.inputs.task_folder(source, 5, size, tmp_path)
        made = list(map(json.loads, (folder / "questions.jsonl").read_text().splitlines()))
        assert [row["choices"][row["label"]] for row in made] == ["0a", "1b", "2c", "3d", "4a"]
        assert {len(set(row["choices"])) for row in made} == {size}
    with pytest.raises(UserError, match="has 40 questions"):
        bench.inputs.task_folder(source, 20, None, tmp_path)


def test_short_pairs_are_short(bench: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = bench.inputs.training_rows("short", "preference", tiny_model, 900, 3, tmp_path)
    rows = list(map(json.loads, (folder / "train.jsonl").read_text().splitlines()))
    assert len(rows) == 3
    assert rows[0] != rows[1]
    assert all(row["chosen"] != row["rejected"] for row in rows)
