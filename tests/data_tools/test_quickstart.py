"""The quickstart's whole path at a small size, with its real parts: interrupted once, gone on with, and looked at."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data_tools import report, teacher
from data_tools.dataset import Dataset
from data_tools.quickstart import Config, steps
from data_tools.quickstart import run as quickstart
from phi1.errors import UserError

COMMAND = [sys.executable, "-m", "phi1.cli", "quickstart", "--no-tune", "--scale", "0.02", "--output"]


STALLED = 900.0
"""Seconds without any progress after which a run counts as hung; how long a run takes is no part of the tests."""


def follow(command: list[str], folder: pathlib.Path, until: str | None = None) -> tuple[int, str]:
    """Runs a command until it ends, or until `until` is in the folder, upon which it gets Ctrl-C; (exit status, log).

    Fails when neither the log, nor a file of the run, nor the CPU time of the command's processes has moved for long.
    """
    log = folder.with_suffix(f".log{len(list(folder.parent.glob('*.log*')))}")
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, start_new_session=True)
    progress: object = None
    moved = time.monotonic()
    while process.poll() is None:
        if until is not None and (folder / until).exists():
            until = None
            process.send_signal(signal.SIGINT)
        state = (log.stat().st_size, sum(1 for _ in folder.rglob("*")), cpu_seconds(process.pid))
        if state != progress:
            progress, moved = state, time.monotonic()
        if time.monotonic() - moved > STALLED:
            process.kill()
            raise AssertionError(f"no progress for {STALLED:.0f} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
    return process.returncode, log.read_text()


def cpu_seconds(session: int) -> int:
    """Clock ticks that the living processes of a session have used."""
    ticks = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run's folder. Ctrl-C came while documents were embedded; the second call went on."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    status, log = follow([*COMMAND, str(folder)], folder, until="embedded/00000.json")
    assert status == 130 and "run the same command again" in log, log[-3000:]
    assert not (folder / "embedded" / "manifest.json").exists()
    status, log = follow([*COMMAND, str(folder)], folder)
    assert status == 0, log[-3000:]
    assert "embed: going on after" in log
    assert re.search(r"annotate: \d+ rows already in", log)
    return folder


@pytest.mark.timeout(0)  # `follow` watches progress
def test_every_step_leaves_what_it_is_for(finished: pathlib.Path) -> None:
    names = [step.name for step in steps(Config(output=finished, scale=0.02))]
    timings = json.loads((finished / "timings.json").read_text())
    assert list(timings) == names
    code, filtered = Dataset(finished / "code"), Dataset(finished / "filtered")
    assert code.rows == 150
    assert 0 < filtered.rows < code.rows
    assert {row["max_stars_repo_name"] for row in code.read()} > {"networkx", "sympy", "stripe"}
    assert Dataset(finished / "annotated").rows == Dataset(finished / "gold-embedded").rows == 120
    for run in ("pretrain", "finetune", "solutions"):
        assert (finished / run / "last" / "model.safetensors").exists()
    held_out = Dataset(finished / "exercises-held-out-clean").rows
    assert 20 < held_out <= 40
    for benchmark, problems in (("humaneval", 164), ("exercises", held_out)):
        for run in ("pretrain", "solutions"):
            results = json.loads((finished / "evaluation" / f"{benchmark}-{run}" / "results.json").read_text())
            assert results["scores"][0]["problems"] == problems
            assert sum(results["statuses"].values()) == problems


def test_the_language_model_can_be_the_annotator_instead(tmp_path: pathlib.Path) -> None:
    gold, model = (
        [step.name for step in steps(Config(output=tmp_path, annotator=name))] for name in ("gold", "logprob")
    )
    assert set(gold) - set(model) == {"gold", "gold-embedded"} and not set(model) - set(gold)


@pytest.mark.timeout(0)  # `follow` watches progress
def test_held_out_exercises_share_nothing_with_training(finished: pathlib.Path) -> None:
    train, held = (list(Dataset(finished / name).read()) for name in ("exercises-clean", "exercises-held-out-clean"))
    assert all(count == 0 for count in teacher.overlaps(train, held).values())
    assert {row["source"] for row in train + held} == {"offline-teacher"}


@pytest.mark.timeout(0)  # `follow` watches progress
def test_run_again_does_nothing_twice(finished: pathlib.Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")}
    status, log = follow([*COMMAND, str(finished)], finished)
    assert status == 0 and not re.search(r"shard \d|step \d", log), log
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")} == before


@pytest.mark.timeout(0)  # `follow` watches progress
def test_the_report_is_one_page_that_fetches_nothing(finished: pathlib.Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    for section in ("scores", "pipeline", "filter", "decontamination", "samples", "training", "answers", "sources"):
        assert f'<section id="{section}">' in page
    assert "offline teacher" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", page.replace('xlink:href="#', "#")), (
        "the page refers elsewhere"
    )
    for name in ("filtered-clean", "exercises-held-out-clean", "textbooks"):
        assert name in page


@pytest.mark.timeout(600, func_only=True)
def test_the_report_in_a_browser(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
    ]
    url = (finished / "report.html").as_uri()
    dom = subprocess.run([browser, *flags, "--dump-dom", url], capture_output=True, text=True)
    assert dom.stdout.count("<section") == 9
    assert dom.stdout.count("<svg") >= 2  # the filter's threshold and the losses
    assert ":CONSOLE(" not in dom.stderr, dom.stderr  # no error, nothing that could not be loaded
    picture = tmp_path / "report.png"
    subprocess.run(
        [browser, *flags, "--window-size=1100,1600", f"--screenshot={picture}", url], capture_output=True, check=True
    )
    assert picture.stat().st_size > 20_000


def test_nothing_to_report_is_one_clear_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no dataset, training or evaluation below it; run `phi1 quickstart` first"):
        report.run(report.Config(run=tmp_path))


def test_recipes_are_looked_for_before_the_first_step(tmp_path: pathlib.Path) -> None:
    for name in ("pretrain", "finetune"):
        shutil.copy(Config().recipes / f"quickstart-{name}.toml", tmp_path)
    with pytest.raises(UserError, match=r"quickstart-solutions\.toml"):
        quickstart(Config(recipes=tmp_path, output=tmp_path / "run"))
    assert not (tmp_path / "run" / "code").exists()
