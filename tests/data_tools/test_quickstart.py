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
from phi1.errors import UserError

COMMAND = [sys.executable, "-m", "phi1.cli", "quickstart", "--no-tune", "--scale", "0.02", "--output"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run's folder. Ctrl-C came while documents were embedded; the second call went on."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        first = subprocess.Popen([*COMMAND, str(folder)], stderr=file, start_new_session=True)
        deadline = time.monotonic() + 400
        while "embed: shard 1" not in log.read_text() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130, log.read_text()
    assert "run the same command again" in log.read_text()
    assert not (folder / "embedded" / "manifest.json").exists()
    done = subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "embed: going on after" in done.stderr
    assert re.search(r"annotate: \d+ rows already in", done.stderr)
    return folder


@pytest.mark.timeout(1700)
def test_every_step_leaves_what_it_is_for(finished: pathlib.Path) -> None:
    names = [step.name for step in steps(Config(output=finished, scale=0.02))]
    timings = json.loads((finished / "timings.json").read_text())
    assert list(timings) == names
    code, filtered = Dataset(finished / "code"), Dataset(finished / "filtered")
    assert code.rows == 150
    assert 0 < filtered.rows < code.rows
    assert {row["max_stars_repo_name"] for row in code.read()} > {"networkx", "sympy", "stripe"}
    assert Dataset(finished / "annotated").rows == 40
    for run in ("pretrain", "finetune", "solutions"):
        assert (finished / run / "last" / "model.safetensors").exists()
    held_out = Dataset(finished / "exercises-held-out-clean").rows
    assert 20 < held_out <= 40
    for benchmark, problems in (("humaneval", 164), ("exercises", held_out)):
        for run in ("pretrain", "solutions"):
            results = json.loads((finished / "evaluation" / f"{benchmark}-{run}" / "results.json").read_text())
            assert results["scores"][0]["problems"] == problems
            assert sum(results["statuses"].values()) == problems


@pytest.mark.timeout(1700)
def test_held_out_exercises_share_nothing_with_training(finished: pathlib.Path) -> None:
    train, held = (list(Dataset(finished / name).read()) for name in ("exercises-clean", "exercises-held-out-clean"))
    assert all(count == 0 for count in teacher.overlaps(train, held).values())
    assert {row["source"] for row in train + held} == {"offline-teacher"}


@pytest.mark.timeout(1700)
def test_run_again_does_nothing_twice(finished: pathlib.Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")}
    started = time.monotonic()
    subprocess.run([*COMMAND, str(finished)], check=True, capture_output=True, timeout=120)
    assert time.monotonic() - started < 60
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")} == before


@pytest.mark.timeout(1700)
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


@pytest.mark.timeout(1700)
def test_the_report_in_a_browser(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}/profile",
             "--enable-logging=stderr"]  # fmt: skip
    url = (finished / "report.html").as_uri()
    dom = subprocess.run([browser, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    assert dom.stdout.count("<section") == 8
    assert dom.stdout.count("<svg") >= 2  # the filter's threshold and the losses
    assert ":CONSOLE(" not in dom.stderr, dom.stderr  # no error, nothing that could not be loaded
    picture = tmp_path / "report.png"
    subprocess.run([browser, *flags, "--window-size=1100,1600", f"--screenshot={picture}", url],
                   capture_output=True, check=True, timeout=120)  # fmt: skip
    assert picture.stat().st_size > 20_000


def test_nothing_to_report_is_one_clear_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no dataset, training or evaluation below it; run `phi1 quickstart` first"):
        report.run(report.Config(run=tmp_path))
