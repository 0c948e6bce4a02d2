"""Folders are complete or absent, and built once."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from reward.store import build_once, canonical, content_key, fingerprint, is_complete, write_json


def slow_build(folder: Path, log: Path) -> None:
    def build(partial: Path) -> dict[str, str]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (partial / "data").write_text("x")
        return {"key": "k"}

    build_once(folder, build)
    assert is_complete(folder)


def test_racing_builders_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=slow_build, args=(tmp_path / "out", tmp_path / "log"))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_failed_builder_leaves_nothing(tmp_path: Path) -> None:
    def build(partial: Path) -> dict[str, str]:
        (partial / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        build_once(tmp_path / "out", build)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert build_once(tmp_path / "out", lambda partial: {}) == tmp_path / "out"


def test_what_a_killed_builder_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    (tmp_path / "out").mkdir()  # no manifest: it does not count
    (tmp_path / "out" / "half").write_text("x")
    build_once(tmp_path / "out", lambda partial: {"key": "k"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: set[str] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        settled.add(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        assert not (tmp_path / "made").exists()
        fsync(handle)

    def build(partial: Path) -> dict[str, str]:
        (partial / "below").mkdir()
        (partial / "below" / "weights").write_text("x")
        return {}

    monkeypatch.setattr(os, "fsync", noted)
    build_once(tmp_path / "made", build)
    assert {"weights", "below", "manifest.json", ".made.partial"} <= settled


def test_keys_ignore_the_order_of_names_only() -> None:
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key([1, 2]) != content_key([2, 1])
    assert canonical({"a": 1.0}) != canonical({"a": 1.5})


def test_fingerprint_sees_content_and_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("same")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "file").write_text("other")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    (tmp_path / "b" / "file").rename(tmp_path / "b" / "renamed")
    (tmp_path / "b" / "renamed").write_text("same")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_remembered_hashes_notice_a_change(tmp_path: Path) -> None:
    big, cache = tmp_path / "big", tmp_path / "cache.json"
    big.write_bytes(b"a" * (5 << 20))
    first = fingerprint(big, cache)
    assert cache.is_file()
    assert fingerprint(big, cache) == first
    big.write_bytes(b"b" * (5 << 20))
    os.utime(big, ns=(1, 1))
    assert fingerprint(big, cache) != first


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 2\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
