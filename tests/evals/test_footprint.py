"""Footprints of a tiny model, each taken in a process of its own."""

import math
import sys
from pathlib import Path

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Kind, Model, Role, Suite
from evals import footprint
from evals.quantize import QUANTIZERS, Quantizer
from evals.results import EvalResult
from evals.run import Request, evaluate

SUITE = Suite(name="footprint", kind=Kind.footprint, role=Role.cost)


def taken(path: Path, quantizer: str, root: Path) -> EvalResult:
    request = Request(Model(path=str(path), dtype=Dtype.bfloat16), quantizer, SUITE)
    return next(evaluate([request], root))


def test_footprint_of_the_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    result = taken(tiny_model, "none", tmp_path)
    scores = {score.metric: score for score in result.scores}
    assert list(scores) == [
        "size_mb", "load_peak_mb", "peak_mb", "prefill_tokens_per_s", "decode_tokens_per_s"
    ]  # fmt: skip
    file = (tiny_model / "model.safetensors").stat().st_size
    assert file - 4096 < scores["size_mb"].value * 1e6 < file  # all but the header
    assert scores["size_mb"].value < scores["load_peak_mb"].value < 200
    assert 0 < scores["peak_mb"].value < 200  # libraries alone would be more
    for metric in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        assert scores[metric].higher_is_better
        assert scores[metric].value > 1
        assert scores[metric].stderr > 0
        assert scores[metric].n == footprint.REPEATS
    assert not scores["peak_mb"].higher_is_better
    assert math.isnan(scores["size_mb"].stderr)
    assert result.samples == {}
    assert result.settings["threads"] >= 1
    assert result.settings["processor"]


def test_a_gguf_format_has_the_size_of_its_file_and_no_speed_of_another(
    tiny_model: Path, tmp_path: Path
) -> None:
    (score,) = taken(tiny_model, "gguf_q8_0", tmp_path).scores
    matrices = 73_728 + 258 * 64
    assert score.metric == "size_mb"
    # 34 bytes for 32 weights, float32 norms, and some kB of names.
    assert score.value * 1e6 == pytest.approx(matrices * 34 / 32 + 4 * 5 * 64, abs=4096)


def test_a_format_that_cannot_run_is_a_skip(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "gone", Quantizer("no_such_library"))
    result = taken(tiny_model, "gone", tmp_path)
    assert result.skipped == "no_such_library is not installed"
    assert result.scores == []


def test_what_stops_the_process_is_said() -> None:
    stop = [sys.executable, "-c", "import sys; sys.exit('error: there is no such weight')"]
    with pytest.raises(UserError, match="could not be measured: there is no such weight"):
        footprint._run(stop)


def test_the_peak_is_that_of_the_part_measured() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("memory of the CPU")
    memory = footprint._Memory()
    if memory.source != "VmHWM":
        pytest.skip("this system does not let a peak be forgotten")
    block = torch.ones(25_000_000)  # 100 MB
    del block
    assert memory.peak_mb() == pytest.approx(100, abs=15)
    memory.restart()
    assert memory.peak_mb() < 15


def test_tied_weights_are_stored_once() -> None:
    import torch

    head = torch.nn.Linear(8, 8, bias=False)
    model = torch.nn.ModuleList([head, torch.nn.Linear(8, 8, bias=False)])
    assert footprint.stored_bytes(model) == 2 * 256
    model[1].weight = head.weight
    assert footprint.stored_bytes(model) == 256
