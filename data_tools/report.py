"""One self-contained HTML page of a run: what went in and what was kept, samples, curves, scores, and their sources.

The page has no scripts and fetches nothing; plots are SVG inside it. It is made from what lies in the run's folder
(datasets' manifests, training metrics, evaluations), whatever of it there is.
"""

import dataclasses
import datetime
import html
import io
import json
import pathlib
import re
from typing import Any

from data_tools.dataset import MANIFEST, Dataset
from phi1 import __version__
from phi1.errors import UserError
from phi1.files import atomic_write

_STYLE = """
:root { color-scheme: light; --ink: #1c1e21; --soft: #5b6470; --line: #d9dde2; --fill: #f5f7f9; --accent: #0b57d0; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; } p.lead, .source { color: var(--soft); } .source { font-size: .82rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; } td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem;
text-align: left; vertical-align: top; } th { background: var(--fill); font-weight: 600; } td.n, th.n { text-align: right;
font-variant-numeric: tabular-nums; } pre { background: var(--fill); padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.35; }
details { margin: .4rem 0; } summary { cursor: pointer; } svg { max-width: 100%; height: auto; } .good { color: #137333; } .bad { color: #b3261e; }
.scores { font-size: 1.05rem; } nav a { margin-right: 1rem; color: var(--accent); }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 report`."""

    run: pathlib.Path
    """Folder of the run: its datasets, trainings (metrics.jsonl) and evaluations are found below it."""
    output: pathlib.Path | None = None
    """The HTML file to write; default: report.html in the run's folder."""
    title: str = "phi-1, small"
    """Title of the page."""


def run(config: Config) -> pathlib.Path:
    """Writes the page; returns its path. Raises UserError if the folder holds nothing to report."""
    datasets = _datasets(config.run)
    trainings = sorted(path.parent for path in config.run.glob("*/metrics.jsonl"))
    evaluations = sorted(config.run.glob("evaluation/*.json"))
    if not datasets and not trainings and not evaluations:
        raise UserError(f"--run {config.run}: no dataset, training or evaluation below it; run `phi1 quickstart` first")
    sections = [
        ("scores", "Scores", _scores(evaluations)),
        ("pipeline", "What went in, what was kept", _pipeline(config.run, datasets)),
        ("filter", "The filter", _filter(config.run)),
        ("samples", "Samples", _samples(datasets)),
        ("training", "Training", _trainings(trainings)),
        ("answers", "Answers of the model", _answers(evaluations)),
        ("sources", "Where each number comes from", _sources(config.run, datasets)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{_e(title)}</a>' for name, title, _ in sections)
    body = "\n".join(f'<section id="{name}"><h2>{_e(title)}</h2>\n{text}</section>' for name, title, text in sections)
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(config.title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>'
        f'<h1>{_e(config.title)}</h1><p class="lead">Run {_e(config.run.name)}, made {made} by phi1 {__version__}. The recipe of '
        "<i>Textbooks Are All You Need</i> (arXiv 2306.11644) end to end, on one machine.</p>"
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )
    output = config.output or config.run / "report.html"
    with atomic_write(output, "w") as file:
        file.write(page)
    print(f"report: {output}")
    return output


def _datasets(folder: pathlib.Path) -> list[Dataset]:
    """Whole datasets of rows below the folder, inputs before what is made of them, then by name."""
    found = [Dataset(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}")) if _is_rows(path)]
    ordered: list[Dataset] = []
    while found:  # a dataset's inputs are named by their folders
        names = {dataset.folder.name for dataset in found}
        ready = [d for d in found if not {i["folder"] for i in d.manifest["inputs"]} & (names - {d.folder.name})]
        ordered += ready or found
        found = [d for d in found if d not in ordered]
    return ordered


def _is_rows(manifest: pathlib.Path) -> bool:
    value = json.loads(manifest.read_text(encoding="utf-8"))
    return "stage" in value and "counters" in value


class _Markup(str):
    """Text that is HTML already."""


def _e(value: object) -> str:
    return html.escape(str(value))


def _table(head: list[str], rows: list[list[object]], numeric: frozenset[int] = frozenset()) -> str:
    def cell(tag: str, index: int, value: object) -> str:
        text = f"{value:,}" if isinstance(value, int) else str(value) if isinstance(value, _Markup) else _e(value)
        attribute = ' class="n"' if index in numeric else ""
        return f"<{tag}{attribute}>{text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, h) for i, h in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def _pre(text: str, limit: int = 1500) -> str:
    cut = text if len(text) <= limit else text[:limit] + "\n… (cut here for the page)"
    return f"<pre>{_e(cut)}</pre>"


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)


def _plot(lines: dict[str, tuple[list[float], list[float]]], x: str, y: str, *, log: bool = False) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2))
    axes = figure.subplots()
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=label, linewidth=1.4, marker="o" if len(xs) < 12 else None, markersize=3)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
