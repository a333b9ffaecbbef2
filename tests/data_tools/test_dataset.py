"""A dataset's promises: whole or absent, the same for any number of workers, resumed, checked, never mixed."""

import errno
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet
import pytest
from counting import SCHEMA, Config, die, produce

from data_tools import dataset as dataset_module
from data_tools import timing
from data_tools.dataset import Dataset, Failure, Produced, config_dict, run_stage
from data_tools.engine import Engine
from phi1 import files
from phi1.errors import UserError


def make(folder: pathlib.Path, config: Config | None = None, **options: Any) -> Dataset:
    config = config or Config()
    return run_stage("count", config, folder, [], 4, produce, SCHEMA, **({"quiet": True} | options))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != timing.FILE}


def test_rows_counters_failures_and_receipts(tmp_path: pathlib.Path) -> None:
    dataset = make(tmp_path / "d")
    assert [row["n"] for row in dataset.read()] == dataset.column("n")
    assert dataset.column("n") == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]
    assert dataset.counters == {"rows": 12, "failures": 4, "seen": 16}
    assert dataset.failures()[2] == {"key": "key-2", "reason": "odd"}
    assert [row["n"] for row in dataset.read(shards=[1])] == [10, 11, 12]


def test_workers_do_not_change_a_byte(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "one")
    for workers in (2, 3):
        make(tmp_path / str(workers), Config(workers=workers), engine=Engine(workers=workers))
        assert contents(tmp_path / "one") == contents(tmp_path / str(workers))
    assert len(contents(tmp_path / "one")) == 4 * 2 + 2


def test_an_interrupted_stage_goes_on_after_its_last_whole_shard(tmp_path: pathlib.Path) -> None:
    made: list[int] = []

    def interrupted(config: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
        made.append(shard)
        yield {"n": shard}
        if made == [0, 1, 2]:
            raise KeyboardInterrupt

    def run() -> Dataset:
        return run_stage("count", Config(), tmp_path / "d", [], 4, interrupted, SCHEMA, quiet=True)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(path.name for path in (tmp_path / "d").glob("*.parquet")) == ["00000.parquet", "00001.parquet"]
    with pytest.raises(UserError, match="interrupted there"):
        Dataset(tmp_path / "d")
    assert run().column("n") == [0, 1, 2, 3]
    assert made == [0, 1, 2, 2, 3]
    run()
    assert len(made) == 5


def test_another_config_input_or_stage_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "d", extra={"tuple": (1, 2)})
    make(tmp_path / "d", extra={"tuple": (1, 2)})
    with pytest.raises(
        UserError, match=r"d: holds a dataset made with other settings \(different: config.start: 0 there, 1 asked\)"
    ):
        make(tmp_path / "d", Config(start=1), extra={"tuple": (1, 2)})
    with pytest.raises(UserError, match=r"config\.tuple"):
        make(tmp_path / "d", extra={"tuple": (1, 3)})
    with pytest.raises(UserError, match="inputs"):
        run_stage("count", Config(), tmp_path / "d", [make(tmp_path / "other")], 4, produce, SCHEMA, quiet=True)
    with pytest.raises(UserError, match="stage"):
        run_stage("sum", Config(), tmp_path / "d", [], 4, produce, SCHEMA, quiet=True)


def test_a_folder_in_which_nothing_was_made_can_be_claimed_anew(tmp_path: pathlib.Path) -> None:
    def wrong_server(*_: Any) -> Iterator[Produced]:
        raise UserError("no server there")

    with pytest.raises(UserError, match="no server there"):
        run_stage("count", Config(start=7), tmp_path / "d", [], 4, wrong_server, SCHEMA, quiet=True)
    assert make(tmp_path / "d").column("n")[0] == 0


def test_the_hash_tells_datasets_apart_and_not_their_place(tmp_path: pathlib.Path) -> None:
    assert make(tmp_path / "a").hash == make(tmp_path / "b").hash != make(tmp_path / "c", Config(start=1)).hash


def test_fields_without_effect_are_no_part_of_the_config() -> None:
    assert config_dict(Config(workers=7)) == {"start": 0, "names": ["a", "b"], "place": "somewhere"}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_shard_is_told_and_can_be_made_again(damage: str, tmp_path: pathlib.Path) -> None:
    make(tmp_path / "d")
    path = tmp_path / "d" / "00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    dataset = Dataset(tmp_path / "d")
    assert [row["n"] for row in dataset.read(shards=[1])] == [10, 11, 12]
    with pytest.raises(UserError, match=r"00002\.parquet: corrupt shard.*delete.*run the stage again"):
        list(dataset.read())
    (tmp_path / "d" / "00002.json").unlink()  # what the message says
    (tmp_path / "d" / "manifest.json").unlink()
    assert len(make(tmp_path / "d").column("n")) == 12


def test_what_is_no_dataset_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no dataset there"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not a dataset manifest"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "x"}), encoding="utf-8")
    with pytest.raises(UserError, match="not a dataset manifest"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"stage": "count"}', '{"stage": "count", "inputs": 3, "shards": [], "config": {}}']
)
@pytest.mark.parametrize("name", ["manifest.json", "stage.json", "00002.json"])
def test_files_of_another_version_or_cut_are_told(name: str, text: str, tmp_path: pathlib.Path) -> None:
    make(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink(missing_ok=name != "manifest.json")
    (tmp_path / "d" / name).write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*(delete|another folder)"):
        make(tmp_path / "d")


def test_a_shard_that_is_a_folder_is_told(tmp_path: pathlib.Path) -> None:
    dataset = make(tmp_path / "d")
    (tmp_path / "d" / "00001.parquet").unlink()
    (tmp_path / "d" / "00001.parquet").mkdir()
    with pytest.raises(UserError, match=r"00001\.parquet: corrupt shard"):
        list(dataset.read())


def test_a_full_disk_is_told_and_the_stage_stays_resumable(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # stage.json, then shard 0 and its receipt went well
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left while writing .*00001\.parquet.*run the same command again"):
        make(tmp_path / "d")
    assert sorted(contents(tmp_path / "d")) == ["00000.json", "00000.parquet", "stage.json"]
    monkeypatch.setattr(os, "fsync", fsync)
    assert make(tmp_path / "d").rows == 12


def test_what_a_killed_writer_left_goes_and_a_living_ones_stays(tmp_path: pathlib.Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "d").mkdir()
    left, written = (tmp_path / "d" / f"00000.parquet.tmp-{pid}" for pid in (dead.pid, 1))  # init lives
    left.touch(), written.touch()
    other = 10**10 * (files._MACHINE + 1) + dead.pid  # of another machine, where that number may be a living process's
    theirs, forgotten = (tmp_path / "d" / f"0000{i}.parquet.tmp-{other}" for i in range(2))
    theirs.touch(), forgotten.touch()
    os.utime(forgotten, (0, 0))
    make(tmp_path / "d")
    assert not left.exists() and written.exists()
    assert theirs.exists() and not forgotten.exists()


def test_a_dead_worker_is_one_clear_line_and_the_stage_goes_on(tmp_path: pathlib.Path) -> None:
    engine = Engine(workers=2)
    with pytest.raises(UserError, match=r"a worker process died .*run the same command again to go on"):
        run_stage("count", Config(), tmp_path / "d", [], 4, die, SCHEMA, engine=engine, quiet=True)
    assert not list((tmp_path / "d").glob("*.tmp-*"))
    make(tmp_path / "d")
    make(tmp_path / "whole")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_a_large_shard_is_written_and_read_in_parts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "_GROUP_BYTES", 250)
    dataset = make(tmp_path / "d")
    with pyarrow.parquet.ParquetFile(tmp_path / "d" / "00000.parquet") as file:
        assert file.num_row_groups == 1  # 3 × 100 bytes: written when the third came
    monkeypatch.setattr(dataset_module, "_GROUP_BYTES", 150)
    parts = make(tmp_path / "parts")
    with pyarrow.parquet.ParquetFile(tmp_path / "parts" / "00000.parquet") as file:
        assert file.num_row_groups == 2
    assert list(parts.read()) == list(dataset.read()) and parts.column("n") == dataset.column("n")


def test_a_renamed_input_is_the_same_input(tmp_path: pathlib.Path) -> None:
    def read(folder: str) -> Dataset:
        source = Dataset(tmp_path / folder)
        return run_stage("sum", Config(), tmp_path / "sums", [source], 4, produce, SCHEMA, quiet=True)

    make(tmp_path / "first")
    before = read("first").hash
    (tmp_path / "first").rename(tmp_path / "second")
    assert read("second").hash == before


def test_failures_with_any_name_are_kept_and_too_many_stop(tmp_path: pathlib.Path) -> None:
    def odd(*_: Any) -> Iterator[Produced]:
        yield Failure("bad\udce9name", "odd (7)")
        yield Failure("b", "odd (8)")
        yield {"n": 1}

    def run(**options: Any) -> Dataset:
        return run_stage("odd", Config(), tmp_path / "d", [], 1, odd, SCHEMA, quiet=True, **options)

    with pytest.raises(
        UserError, match=r"2 of 3 rows failed \(2 × odd\), more than --max-failed 0.5; .*d stays unfinished"
    ):
        run(max_failed=0.5)
    assert not (tmp_path / "d" / "manifest.json").exists()
    assert run(max_failed=0.7).failures()[0] == {"key": "bad\\udce9name", "reason": "odd (7)"}


def test_no_row_at_all_warns(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_stage("none", Config(), tmp_path / "d", [], 1, lambda *_: iter([Failure("a", "b")]), SCHEMA, quiet=True)
    assert "no row was made" in capsys.readouterr().err


def test_a_file_size_limit_is_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "code.py").write_text("".join(f"value_{i} = {i * 7919 % 10007}\n" for i in range(3000)))
    command = f"{sys.executable} -m phi1.cli data ingest --sources folder:{tmp_path} --output {tmp_path}/out"
    done = subprocess.run(["bash", "-c", f"ulimit -f 8; {command}"], capture_output=True, text=True)
    assert done.returncode == 2 and "no space left while writing" in done.stderr and "Traceback" not in done.stderr
    assert subprocess.run(command.split(), capture_output=True).returncode == 0
    file = subprocess.run([*command.split()[:-1], str(tmp_path / "code.py")], capture_output=True, text=True)
    assert file.returncode == 2 and file.stderr == f"phi1: error: {tmp_path}/code.py: File exists\n"


@pytest.mark.parametrize("command", ["ingest", "annotate", "embed", "classify", "filter"])
def test_help_is_whole_and_imports_light(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "phi1.cli", "data", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--output" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not imported & {"torch", "transformers", "sklearn", "pyarrow", "openai", "numpy", "xllamacpp"}
