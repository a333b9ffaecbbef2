"""bench/data.py at toy size: every candidate does its whole work; CPU time and memory are those of all processes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import data, data_stages
from bench.data_stages import STAGES, Candidate, Size, Stage

SIZE = Size(gb=0.0004, texts=40, vectors=50, requests=8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_stages, "STACK_ROWS", 10)
        data_stages.make_inputs(folder, SIZE)
    return folder


def test_the_parquet_is_of_the_size_that_was_asked_for(inputs: Path) -> None:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(inputs / "stack" / "data.parquet")
    texts = file.read(["content"]).column("content").to_pylist()
    assert 0.4e6 <= sum(map(len, texts)) < 0.4e6 + (1 << 20) and file.num_row_groups == -(-len(texts) // 10)
    assert len(set(texts)) == len(texts)


def _amounts(stage: str, inputs: Path, tmp_path: Path) -> dict[str, dict[str, float]]:
    (found,) = [each for each in STAGES if each.name == stage]
    result = {}
    for number, candidate in enumerate(found.candidates):
        (tmp_path / str(number)).mkdir()
        try:
            result[candidate.name] = candidate.prepare(inputs, tmp_path / str(number), SIZE)()
        except data_stages.Unavailable as reason:
            assert "pip install datasketch" in str(reason)
    return result


@pytest.mark.parametrize(
    ("stage", "amount"), [("minhash", SIZE.texts), ("score", SIZE.vectors), ("decontaminate", SIZE.vectors)]
)
def test_candidates_do_as_much_as_they_say(
    stage: str, amount: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_stages, "TREES", 10)
    found = _amounts(stage, inputs, tmp_path)
    assert found["ours"]["amount"] == amount and {each["amount"] for each in found.values()} == {amount}


def test_tokenizing_counts_the_text_that_was_read(inputs: Path, tmp_path: Path) -> None:
    found = _amounts("tokenize", inputs, tmp_path)
    documents = data_stages.megabytes(inputs / "documents")
    assert documents > 0.1 and {each["amount"] for each in found.values()} == {documents}


def test_near_twins_that_were_planted_are_found(inputs: Path, tmp_path: Path) -> None:
    assert _amounts("minhash", inputs, tmp_path)["ours"]["twins"] >= SIZE.texts // 5 - 1


def test_requests_are_in_flight_together(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_stages, "CONCURRENCY", 4)
    for figures in _amounts("ask", inputs, tmp_path).values():
        assert figures["amount"] == SIZE.requests and figures["most in flight"] == 4
        assert 1 < figures["in flight"] <= 4


def test_a_stage_is_measured_in_a_process_of_its_own_with_its_workers(inputs: Path, tmp_path: Path) -> None:
    stage = next(stage for stage in STAGES if stage.name == "ingest-stack")
    (row,) = data.compare(dataclasses.replace(stage, candidates=stage.candidates[:1]), inputs, SIZE, 1)
    assert row.amount is not None and row.amount > 10
    assert row.cpu_seconds[0] > 0 and row.rate == row.amount / row.cpu_seconds[0] and row.peak_bytes > 20 << 20
    assert row.implementation in data.table([row])


def test_memory_of_grandchildren_counts() -> None:
    inner = "import sys; held = b'x' * (150 << 20); print('held', flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert 150 << 20 < data.resident(process.pid) < 400 << 20
        assert data.resident(os.getpid()) >= data.resident(process.pid)
        process.communicate("")


def test_ratios_are_to_the_best_peer_and_what_is_missing_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"a": (2.0, 10.0), "b": (1.0, 5.0), "c": (4.0, 10.0)}

    def measure(stage: str, candidate: Candidate, *_: object) -> dict[str, object]:
        if candidate.name == "absent":
            return {"unavailable": "pip install absent", "peak": 0}
        cpu, amount = said[candidate.name]
        return {"cpu": cpu, "wall": cpu, "amount": amount, "peak": 1 << 20}

    names = [("a", True), ("b", False), ("c", False), ("absent", False)]
    stage = Stage("s", "texts", tuple(Candidate(name, ours, data_stages.twins) for name, ours in names), 5.0)
    monkeypatch.setattr(data, "measure", measure)
    monkeypatch.setattr(data, "STAGES", (stage,))
    monkeypatch.setattr(data, "make_inputs", lambda *_: None)
    rows = data.main(["--stages", "s", "--rounds", "2", "--json", str(tmp_path / "r.json")])
    assert [row.ratio for row in rows] == [1.0, 1.0, 0.5, None]
    shown = capsys.readouterr().out
    assert "| s | **a** | 10 texts | 2.00 (2.00–2.00) | 2.00 | 5 | 1.00 | 1 | 5.0 × wanted |" in shown
    assert "pip install absent" in shown
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["environment"]["kind"] and len(document["rows"]) == 4
    data.save(tmp_path / "saved", document, rows)
    assert "pip install absent" in (tmp_path / "saved.md").read_text()
    with pytest.raises(SystemExit):
        data.main(["--gb", "0"])
