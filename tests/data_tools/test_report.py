"""The report's page: every removed pair beside its task, and what no page can hold."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pytest

from bench.decontaminate import renamed
from data_tools import decontaminate, diversity, ingest, plan, report
from data_tools.dataset import Dataset, run_stage
from phi1.errors import UserError
from phi1.evaluate import humaneval

PROBLEMS = humaneval.load()


@dataclasses.dataclass(frozen=True)
class Made:
    of: tuple[str, ...]


def test_every_removed_pair_stands_beside_its_task(tmp_path: pathlib.Path) -> None:
    contents = (renamed(PROBLEMS[1]), PROBLEMS[9].prompt + PROBLEMS[9].solution, "def f(:\n    pass\n", "x = 1\n")

    def produce(*_: Any) -> Iterator[dict[str, Any]]:
        for content in contents:
            yield {"hexsha": hashlib.sha1(content.encode()).hexdigest(), "content": content}

    schema = pyarrow.schema([("hexsha", pyarrow.string()), ("content", pyarrow.string())])
    run_stage("made", Made(contents), tmp_path / "code", [], 1, produce, schema, quiet=True)
    config = decontaminate.Config(input=tmp_path / "code", output=tmp_path / "code-clean", embedder="none")
    decontaminate.run(config)
    page = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    section = page[page.index('<section id="decontamination">') :]
    section = section[: section.index("</section>")]
    assert section.count('<div class="pair">') == 3
    assert "separate_paren_groups" in section and "zz_separate_paren_groups" in section and "rolling_max" in section
    assert "no task: it could not be compared" in section and "2 of 164" in section
    assert 'removed unchecked</td><td class="n">1' in section and 'kept without code</td><td class="n">1' in section


def test_halves_of_characters_do_not_stop_the_page(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "evaluation" / "humaneval-base"
    folder.mkdir(parents=True)
    score = {
        "group": "all",
        "cut": "parsing",
        "problems": 1,
        "k": 1,
        "pass": 0.0,
        "low": 0.0,
        "high": 0.9,
        "bootstrap": [0, 0],
    }
    results = {"benchmark": "humaneval", "checkpoint_folder": "a/b", "scores": [score, score | {"cut": "stop strings"}]}
    (folder / "results.json").write_text(json.dumps(results))
    row = {
        "task_id": "HumanEval/0",
        "status": "failed",
        "detail": "ValueError: \ud800",
        "program": "raise ValueError('\ud800')\u2028",
    }
    (folder / "samples.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"detail": "a\u2028b"}, ensure_ascii=True) + "\n"
    )
    page = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    assert "ValueError: \\ud800" in page and "cut at stop strings" in page


def test_a_training_that_was_cut_is_shown_and_a_manifest_of_another_program_is_none(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    step = {"step": 1, "loss": 2.5, "tokens": 64, "seconds": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n" + '{"step": 2, "lo')
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('["of another program"]')
    run_stage("made", Made(("x",)), tmp_path / "code", [], 1, lambda *_: [{"n": 1}], NUMBERS, quiet=True)
    page = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    assert '<td class="n">1</td><td class="n">64</td><td class="n">2.500</td>' in page


NUMBERS = pyarrow.schema([("n", pyarrow.int64())])


@pytest.mark.parametrize(
    ("file", "content", "advice"),
    [
        ("model/metrics.jsonl", "{\n", "delete the line"),
        ("model/metrics.jsonl", '{"loss": 1.0}\n', "delete the line"),
        ("code/diversity.json", '{"dataset": ', "run `phi1 data diversity` again"),
        ("code/diversity.json", "[]", "run `phi1 data diversity` again"),
        ("timings.json", '{"code": "long"}', "delete it"),
        ("timings.json", "[1]", "delete it"),
        ("forest/metrics.json", '{"made_of": {}}', "run `phi1 data classify` again"),
        ("forest/metrics.json", "", "run `phi1 data classify` again"),
        ("evaluation/a/results.json", '{"benchmark": "humaneval"}', "run `phi1 evaluate` again"),
        ("other/manifest.json", "version: 3", "leave that folder out"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: str, advice: str, tmp_path: pathlib.Path) -> None:
    run_stage("made", Made(("x",)), tmp_path / "code", [], 1, lambda *_: [{"n": 1}], NUMBERS, quiet=True)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{file}: not what was written there .*{advice}"):
        report.run(report.Config(run=tmp_path))


def test_diversity_is_drawn_where_it_was_measured(tmp_path: pathlib.Path) -> None:
    """A curve for each dataset that has a measurement of what it holds now; no section without one."""
    schema = pyarrow.schema([("content", pyarrow.string())])
    for name, different in (("few", 3), ("many", 120)):
        contents = [" ".join(f"w{i % different}x{k}" for k in range(12)) for i in range(120)]
        rows = [{"content": content} for content in contents]
        run_stage("made", Made(tuple(contents)), tmp_path / name, [], 1, lambda *_, rows=rows: rows, schema, quiet=True)
    empty = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    assert '<section id="diversity">' not in empty
    for name in ("few", "many"):
        diversity.run(diversity.Config(input=tmp_path / name))
    page = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    section = page[page.index('<section id="diversity">') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 3 and "Vendi score" in section and "near twins of earlier rows, %" in section
    assert "97.5%" in section and "0.0%" in section and "<h3>few</h3>" in section and "<h3>many</h3>" in section
    (tmp_path / "few" / diversity.FILE).write_bytes((tmp_path / "many" / diversity.FILE).read_bytes())
    page = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    assert "<h3>few</h3><pre>        rows" not in page and "97.5%" not in page


def test_the_funnel_shows_rows_and_tokens_of_each_dataset(tmp_path: pathlib.Path) -> None:
    rows = [{"hexsha": str(i), "content": f"x = {i}" * 40, "source": "s", "kind": "code"} for i in range(7)]
    run_stage(
        "ingest",
        ingest.Config(output=tmp_path / "first"),
        tmp_path / "first",
        [],
        1,
        lambda *_: iter(rows),
        ingest.schema(),
        quiet=True,
    )
    run_stage(
        "filter",
        ingest.Config(output=tmp_path / "second"),
        tmp_path / "second",
        [Dataset(tmp_path / "first")],
        1,
        lambda *_: iter(rows[:3]),
        ingest.schema(),
        quiet=True,
    )
    page = report.run(report.Config(run=tmp_path)).read_text(encoding="utf-8")
    picture = page[page.index("<svg") : page.index("</svg>")]
    steps = plan.funnel(tmp_path)
    shown = [
        f"<!-- {text} -->" for step in steps for text in (step["name"], f"{step['rows']:,}", f"{step['tokens']:,}")
    ]
    assert [step["rows"] for step in steps] == [7, 3] and all(text in picture for text in shown)
