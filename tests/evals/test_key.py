"""A result's key changes with each byte that the result depends on, and with nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import Model, Suite
from evals.run import Request

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {test: data/capitals.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: !function helper.question
doc_to_target: 0
doc_to_choice: [Paris, Rome]
"""
HELPER = 'def question(doc):\n    return doc["question"]\n'
ROW = '{"question": "The capital of France is"}\n'
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def setting(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with a model, task files that have run before, and their data beside them."""
    home = tmp_path / "home"
    shutil.copytree(tiny_model, home / "model")
    for name, text in {
        "tasks/capitals.yaml": TASK,
        "tasks/helper.py": HELPER,
        "data/capitals.jsonl": ROW,
        "adapter/adapter_config.json": "{}",
        "adapter/adapter_model.safetensors": "00",
        "plain.jinja": "{{ messages[0]['content'] }}",
        "model/generation_config.json": '{"do_sample": true}',
    }.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    return home


def key(home: Path, cache: Path) -> str:
    model = Model(
        path=str(home / "model"),
        adapter=str(home / "adapter"),
        chat_template=str(home / "plain.jinja"),
    )
    suite = Suite(name="s", tasks=["capitals"], include_path=str(home / "tasks"))
    return Request(model, "none", suite).key(cache)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name",
    [
        "model/model.safetensors",
        "model/config.json",
        "model/generation_config.json",
        *(f"model/{name}" for name in TOKENIZER_FILES),
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "plain.jinja",
        "tasks/capitals.yaml",
        "tasks/helper.py",
        "data/capitals.jsonl",
    ],
)
def test_one_byte_anywhere_gives_another_key(setting: Path, tmp_path: Path, name: str) -> None:
    before = key(setting, tmp_path)
    flip(setting / name)
    assert key(setting, tmp_path) != before


def test_a_trained_model_is_known_by_its_bytes_not_by_its_manifest(
    setting: Path, tmp_path: Path
) -> None:
    plain = key(setting, tmp_path)
    manifest = setting / "model" / "manifest.json"
    manifest.write_text('{"key": "0123456789abcdef"}')
    assert key(setting, tmp_path) == plain
    flip(setting / "model" / "model.safetensors")
    assert key(setting, tmp_path) != plain


def test_equal_content_elsewhere_has_the_same_key(setting: Path, tmp_path: Path) -> None:
    before = key(setting, tmp_path)
    other = tmp_path / "elsewhere" / "deep"
    shutil.copytree(setting, other)
    assert key(other, tmp_path) == before
    # What the first run leaves, and what is not read, do not count.
    (other / "tasks" / "__pycache__").mkdir()
    (other / "tasks" / "__pycache__" / "helper.cpython-311.pyc").write_bytes(b"made by Python")
    (other / "model" / "README.md").write_text("a model card")
    (other / "model" / "checkpoint-5").mkdir()
    (other / "model" / "checkpoint-5" / "config.json").write_text("{}")
    (other / "data" / "other.jsonl").write_text(ROW)
    assert key(other, tmp_path) == before


def test_data_that_an_environment_variable_names(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = setting / "tasks" / "helper.py"
    helper.write_text('import os\nROOT = os.environ.get("CAPITALS_DIR")\n' + HELPER)
    before = key(setting, tmp_path)
    other = tmp_path / "other" / "data"
    other.mkdir(parents=True)
    (other / "capitals.jsonl").write_text(ROW.replace("France", "Italy"))
    monkeypatch.setenv("CAPITALS_DIR", str(other.parent))
    there = key(setting, tmp_path)
    flip(other / "capitals.jsonl")
    monkeypatch.setenv("UNRELATED", "1")
    assert len({before, there, key(setting, tmp_path)}) == 3


def test_a_word_that_looks_like_a_home_is_a_name(setting: Path, tmp_path: Path) -> None:
    before = key(setting, tmp_path)
    with (setting / "tasks" / "helper.py").open("a") as file:
        file.write("# it once read ~backup.csv\n")
    assert key(setting, tmp_path) != before


def test_real_task_files_name_their_data(shared_data: Path, tmp_path: Path) -> None:
    from evals import taskfiles

    found = taskfiles.content(str(shared_data / "lm_eval_tasks"), tmp_path)
    assert found is not None
    names = {name for name, _ in found["data"]}
    assert {"sft/gsm8k.train.jsonl.gz", "eval/mmlu.dev.jsonl.gz"} <= names


def test_a_hub_adapter_is_known_by_its_commit(tmp_path: Path) -> None:
    """In processes of their own: the commit of an id is asked once in each."""
    code = (
        "import sys; from pathlib import Path; from conf.schema import Model; "
        "from evals.models import identity; "
        "print(identity(Model(path='a/b', adapter='c/d'), Path(sys.argv[1]))['adapter'])"
    )

    def adapter() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")},
            cwd=Path(__file__).parents[2],
        )
        return done.stdout.strip()

    ref = tmp_path / "hub" / "models--c--d" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("1111")
    assert adapter() == "c/d@1111"
    ref.write_text("2222")
    assert adapter() == "c/d@2222"
