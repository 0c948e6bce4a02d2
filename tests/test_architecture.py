"""The house's laws: arrows point one way, and nothing heavy loads before it is needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["conf", "reward", "evals", "align"]  # each may import those before it
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "datasets",
    "lm_eval",
    "wandb",
    "matplotlib",
    "scipy",
}
# module → the only places that may import it
DOORS = {
    "lm_eval": ("evals/harness.py", "evals/backend.py", "evals/tasks/"),
    "trl": ("align/stages/", "align/ppo/"),
    "wandb": ("evals/track.py",),
}


def modules() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    place = path.relative_to(ROOT)
    allowed = LAYERS[: LAYERS.index(place.parts[0]) + 1]
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        top = name.split(".")[0]
        assert top not in LAYERS or top in allowed, f"{place} imports {name}"
        assert not name.startswith("trl.experimental"), f"{place} depends on trl.experimental"
        if top in DOORS:
            assert any(str(place).startswith(door) for door in DOORS[top]), (
                f"{place} imports {name}"
            )


def loaded_after(*argv: str) -> tuple[set[str], int]:
    """Heavy modules that a command line leaves in `sys.modules`, and its exit code."""
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = {['prog', *argv[1:]]!r}\n"
        "code = 0\n"
        "try:\n"
        f"    runpy.run_module({argv[0]!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    code = stop.code or 0\n"
        "print('\\n' + json.dumps([sorted(sys.modules), code]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    names, exit_code = json.loads(done.stdout.splitlines()[-1])
    return HEAVY & {name.split(".")[0] for name in names}, exit_code


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("align", "--help"), 0),
        (("evals", "--help"), 0),
        (("evals.documents", "--help"), 0),
        (("evals.prefetch", "--help"), 0),
        (("evals.sample", "--help"), 0),
        (("evals.mine", "--help"), 0),
        (("evals.judge", "--help"), 0),
        (("evals.winrate", "--help"), 0),
        (("reward.score", "--help"), 0),
        (("reward.score", "./absent", "x.jsonl", "y.jsonl"), 2),
        (("reward.average", "--help"), 0),
        (("reward.report", "--help"), 0),
        (("reward.report", "model.path=x"), 2),
        (("reward.overoptimization", "--help"), 0),
        (("reward.rank", "--help"), 0),
        (("reward.rank", "reward=model", "samples=x.jsonl", "out=y.jsonl"), 2),
        (("reward.rank", "reward=exact", "samples=x.jsonl", "out=y.jsonl", "keep=2"), 2),
        (("reward.rank", "reward=exact", "model.path=x", "source=demo:held_out", "out=y"), 2),
        (("align", "+experiment=demo", "--cfg", "job"), 0),
        (("align", "+experiment=demoo"), 2),
        (("align", "+experiment=demo", "dpo.args.betta=1"), 2),
        (("align", "+experiment=demo", "seed=abc"), 2),
        (("evals", "model.path=x", "suite=nope"), 2),
        (("evals.documents", "suite=gsm8k"), 2),
        (("evals.prefetch", "suite=nope"), 2),
        (("evals.prefetch",), 2),
        (("evals", "--model", "x"), 2),
        (("evals", "model.path=./absent"), 2),
        (("evals", "model.path=owner/name", "suite.metrics=[f2]"), 2),
        (("evals", "model.path=owner/name", "suite=forgetting_offline", "suite.tasks=[piqua]"), 2),
        (("evals.compare", "absent", "absent"), 2),
        (("evals.report", "absent", "--out", "x"), 2),
        (("reward.serve", "--help"), 0),
        (("reward.serve", "model.path=x", "max_rows=0"), 2),
        (("evals.judge", "absent", "absent", "x"), 2),
        (("evals.sample", "model.path=x", "source=demo:held_out", "out=x.jsonl", "n=0"), 2),
    ],
)
def test_help_and_config_errors_load_nothing_heavy(argv: tuple[str, ...], code: int) -> None:
    assert loaded_after(*argv) == (set(), code)
