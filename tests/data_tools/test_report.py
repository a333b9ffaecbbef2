"""The report's page: every removed pair beside its task, and what no page can hold."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow

from bench.decontaminate import renamed
from data_tools import decontaminate, report
from data_tools.dataset import run_stage
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
