"""Averages of weights, against arithmetic on the loaded tensors."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from reward.average import average
from reward.model import RewardModel

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


def tensors(folder: Path) -> dict[str, Any]:
    import safetensors.torch

    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def save(values: dict[str, Any], folder: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(values, folder / WEIGHTS, {"format": "pt"})


@pytest.fixture
def copy(seeded_reward_model: Callable[[int], Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(seeded_reward_model(1), tmp_path / name))

    return make


def test_an_average_is_the_mean_of_the_weights(
    seeded_reward_model: Callable[[int], Path], tmp_path: Path
) -> None:
    import torch

    folders = [seeded_reward_model(seed) for seed in (1, 2, 3)]
    out = average(tmp_path / "out", folders, [1, 2, 5])
    parts = [tensors(folder) for folder in folders]
    for name, found in tensors(out).items():
        wide = [part[name].double() for part in parts]
        expected = (wide[0] + 2 * wide[1] + 5 * wide[2]) / 8
        torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-6)
        assert found.dtype == parts[0][name].dtype
    assert parts[0].keys() == tensors(out).keys()
    manifest = json.loads((out / "manifest.json").read_text())
    assert [member["share"] for member in manifest["members"]] == [0.125, 0.25, 0.625]
    assert len({member["weights"] for member in manifest["members"]}) == 3
    turns = [[{"role": "user", "content": "Hi"}]]
    (score,) = RewardModel.load(str(out)).score(turns, [[{"role": "assistant", "content": "a"}]])
    assert abs(score) < 100
    assert average(out, folders, [2, 4, 10]) == out  # the same shares: it is there
    with pytest.raises(UserError, match="is not the average of these models"):
        average(out, folders)


def test_an_average_of_equals_is_bit_identical(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    """Negative zeros and 16-bit numbers among them, and thirds that no binary fraction holds."""
    import torch

    folders = [copy(name) for name in "abc"]
    values = tensors(folders[0])
    values["model.norm.weight"][:2] = torch.tensor([-0.0, 0.1])
    values["score.weight"] = values["score.weight"].bfloat16()
    for folder in folders:
        save(values, folder)
    out = average(tmp_path / "out", folders)
    for name, found in tensors(out).items():
        assert found.dtype == values[name].dtype
        assert torch.equal(found.view(torch.uint8), values[name].view(torch.uint8)), name


def test_files_of_other_sizes_are_read_tensor_by_tensor(
    seeded_reward_model: Callable[[int], Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    whole, other = seeded_reward_model(1), seeded_reward_model(2)
    split = tmp_path / "split"
    loaded = AutoModelForSequenceClassification.from_pretrained(whole)
    loaded.save_pretrained(split, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(whole).save_pretrained(split)
    assert len(list(split.glob("*.safetensors"))) > 1
    expected = tensors(average(tmp_path / "a", [whole, other]))
    found = average(tmp_path / "b", [split, other])
    assert len(list(found.glob("*.safetensors"))) == len(list(split.glob("*.safetensors")))
    assert all(torch.equal(value, expected[name]) for name, value in tensors(found).items())
    RewardModel.load(str(found))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_models_that_do_not_fit_are_refused_with_the_difference(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch

    first, out = copy("first"), tmp_path / "out"

    def refused(other: Path, reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            average(out, [first, other])
        assert not out.exists()
        assert not list(tmp_path.glob(".out*partial"))

    edit((config := copy("config")) / "config.json", rms_norm_eps=0.5, architectures=["Other"])
    refused(config, r"architectures is \['Other'\], not \['LlamaFor")
    refused(config, r"rms_norm_eps is 0\.5, not 1e-06")
    (template := copy("template") / "chat_template.jinja").write_text("{{ messages }}")
    refused(template.parent, "the chat template differs")
    edit((special := copy("special")) / "tokenizer_config.json", eos_token="a")
    refused(special, "special tokens differs")
    file = (words := copy("words")) / "tokenizer.json"
    vocabulary = json.loads(file.read_text())["model"]
    vocabulary["vocab"] |= {"a": vocabulary["vocab"]["b"], "b": vocabulary["vocab"]["a"]}
    edit(file, model=vocabulary)
    refused(words, "the tokenizer's vocabulary differs")
    values = tensors(first)
    save(values | {"score.weight": torch.zeros(2, 64)}, shape := copy("shape"))
    refused(shape, r"tensor score.weight is F32 \[2, 64\], not F32 \[1, 64\]")
    save({k: v for k, v in values.items() if k != "score.weight"}, headless := copy("headless"))
    refused(headless, r"only one has: score.weight \(1 in all\)")
    broken = {**values, "score.weight": torch.full((1, 64), float("nan"))}
    save(broken, nan := copy("nan"))
    refused(nan, "tensor score.weight is not finite")
    (copy("empty") / WEIGHTS).unlink()
    refused(tmp_path / "empty", "is missing or cannot be read")
    refused(tmp_path / "absent", r"config\.json is missing")


def test_what_is_there_is_never_replaced(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folders = [copy("a"), copy("b")]
    (mine := tmp_path / "mine").mkdir()
    (mine / "notes.txt").write_text("keep me")
    for out in (mine, folders[0]):
        with pytest.raises(UserError, match="choose another folder"):
            average(out, folders)
    assert (mine / "notes.txt").read_text() == "keep me"


def test_command_line(copy: Callable[[str], Path], tmp_path: Path) -> None:
    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reward.average", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    out = tmp_path / "out"
    done = run(out, copy("a"), copy("b"), "--weights", "1", "3")
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    for argv, reason in (
        ((out, tmp_path / "a"), "at least two models"),
        ((out, tmp_path / "a", tmp_path / "b", "--weights", "1"), "1 weights for 2 models"),
        ((out, tmp_path / "a", tmp_path / "b", "--weights", "0", "0"), "not all 0"),
    ):
        done = run(*argv)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert reason in done.stderr
