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

from data_tools import classify, decontaminate, diversity, plan
from data_tools.dataset import MANIFEST, Dataset, reading, sweep
from data_tools.tasks import load
from phi1 import __version__
from phi1.errors import UserError
from phi1.evaluate.run import read_lines
from phi1.files import atomic_write

_STYLE = """
:root { color-scheme: light; --ink: #1c1e21; --soft: #5b6470; --line: #d9dde2; --fill: #f5f7f9; --accent: #0b57d0; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; } p.lead, .source { color: var(--soft); } .source { font-size: .82rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: var(--fill); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--fill); padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.35; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; } .pair > * { min-width: 0; }
details { margin: .4rem 0; } summary { cursor: pointer; } svg { max-width: 100%; height: auto; }
.good { color: #137333; } .bad { color: #b3261e; } .scores { font-size: 1.05rem; }
nav a { margin-right: 1rem; color: var(--accent); }
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
    trainings = sorted((path.parent for path in config.run.glob("*/metrics.jsonl")), key=lambda p: p.stat().st_mtime)
    evaluations = sorted(config.run.glob("evaluation/*/results.json"))
    if not datasets and not trainings and not evaluations:
        raise UserError(f"--run {config.run}: no dataset, training or evaluation below it; run `phi1 quickstart` first")
    sections = [
        ("scores", "Scores", _scores(evaluations)),
        ("pipeline", "What went in, what was kept", _pipeline(config.run, datasets)),
        ("filter", "The filter", _filter(config.run)),
        ("decontamination", "What was too close to a benchmark", _decontamination(config.run, datasets)),
        ("diversity", "How different the texts are", _diversity(datasets)),
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
        f'<meta name="viewport" content="width=device-width"><link rel="icon" '
        f'href="data:,"><style>{_STYLE}</style></head>\n<body>'
        f'<h1>{_e(config.title)}</h1><p class="lead">Run {_e(config.run.name)}, made {made} by phi1 {__version__}. The '
        f"recipe of "
        "<i>Textbooks Are All You Need</i> (arXiv 2306.11644) end to end, on one machine.</p>"
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )
    output = config.output or config.run / "report.html"
    sweep(output.parent)
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
    value = _manifest(manifest)
    return "stage" in value and "counters" in value


def _manifest(path: pathlib.Path) -> dict[str, Any]:
    """A manifest of whatever program; {} of one that is no object, which none of ours is."""
    with reading(path, "leave that folder out, or run its stage again"):
        value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


class _Markup(str):
    """Text that is HTML already."""


def _e(value: object) -> str:
    """Escaped; halves of characters, which no page can hold, as Python writes them."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


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


def _plot(lines: dict[str, tuple[list[float], list[float]]], x: str, y: str, *, log_x: bool = False) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2))
    axes = figure.subplots()
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=label, linewidth=1.4, marker="o" if len(xs) < 12 else None, markersize=3)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log_x:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


_KIND_COLOURS = {"code": "#4c78a8", "textbooks": "#54a24b", "exercises": "#f58518"}
_EVALUATE = "delete it and run `phi1 evaluate` again"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


# ---------------------------------------------------------------------------------------------- sections


def _scores(evaluations: list[pathlib.Path]) -> str:
    rows: list[list[object]] = []
    for path in evaluations:
        with reading(path, _EVALUATE):
            results = json.loads(path.read_text(encoding="utf-8"))
            for row in results["scores"]:
                group = "" if row["group"] == "all" else f" ({row['group']})"
                group += ", cut at stop strings" if row.get("cut", "parsing") != "parsing" else ""
                rows.append(
                    [
                        f"{results['benchmark']}{group}",
                        _checkpoint_name(results),
                        f"pass@{row['k']}",
                        row["problems"],
                        _Markup(f"<b>{_percent(row['pass'])}</b>"),
                        f"{_percent(row['low'])} – {_percent(row['high'])}",
                    ]
                )
    if not rows:
        return ""
    note = (
        "HumanEval is 164 problems written by people; a model of a few million parameters is expected near 0 there. "
        "The held-out exercises come from the offline teacher, a program that composes exercises from families: the "
        "families were seen in training, the function names, constants and compositions of these were not."
    )
    head = ["benchmark", "model", "measure", "problems", "score", "95% interval"]
    return f'<div class="scores">{_table(head, rows, frozenset({3, 4}))}</div><p class="source">{note}</p>'


def _checkpoint_name(results: dict[str, Any]) -> str:
    folder = pathlib.Path(results["checkpoint_folder"])
    return f"{folder.parent.name}/{folder.name}"


def _pipeline(folder: pathlib.Path, datasets: list[Dataset]) -> str:
    timings = _timings(folder)
    rows: list[list[object]] = []
    for dataset in datasets:
        manifest = dataset.manifest
        others = {k: v for k, v in dataset.counters.items() if k not in ("rows", "failures") and v}
        detail = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in sorted(others.items()))
        entering = ", ".join(item["folder"] for item in manifest["inputs"]) or "–"
        rows.append(
            [
                dataset.folder.name,
                manifest["stage"],
                entering,
                dataset.rows,
                dataset.counters["failures"],
                detail,
                f"{timings[dataset.folder.name]:,.0f} s" if dataset.folder.name in timings else "",
            ]
        )
    if not rows:
        return ""
    head = ["dataset", "stage", "made from", "rows kept", "failed", "counted on the way", "time"]
    text = _funnel(plan.funnel(folder)) + _table(head, rows, frozenset({3, 4, 6}))
    tokens = [
        _manifest(path) | {"folder": path.parent.name}
        for path in sorted(folder.glob("*/manifest.json"))
        if not _is_rows(path)
    ]
    shards = [[t["folder"], t["tokens"], t["documents"]] for t in tokens if "tokens" in t and "documents" in t]
    if shards:
        text += "<h3>Token shards</h3>" + _table(["folder", "tokens", "documents"], shards, frozenset({1, 2}))
    return text


def _funnel(steps: list[dict[str, Any]]) -> str:
    """Rows and tokens of each dataset as bars, in the order of the pipeline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.6 + 0.22 * len(steps)))
    names = [step["name"] for step in steps]
    titles = {"rows": "rows", "tokens": "tokens (of text about one for 3.2 bytes)"}
    for axes, what in zip(figure.subplots(1, 2, sharey=True), titles, strict=True):
        values = [step[what] for step in steps]
        bars = axes.barh(
            names, values, height=0.7, color=[_KIND_COLOURS.get(step["kind"], "#999999") for step in steps]
        )
        axes.bar_label(bars, [f"{value:,}" for value in values], padding=2, fontsize=7)
        axes.set_xscale("symlog")
        axes.set_xlim(0, 30 * max(1, *values))
        axes.set_title(titles[what], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    return _svg(figure)


def _filter(folder: pathlib.Path) -> str:
    path = folder / "forest" / classify.METRICS
    if not path.exists():
        return ""
    text = _pre(classify.describe(classify.read_metrics(path.parent)))
    plot = path.with_name(classify.PLOT)
    if plot.exists():
        with reading(plot, f"delete it and {path.name} and run `phi1 data classify` again"):
            svg = plot.read_text(encoding="utf-8")
            text += re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    return text


def _decontamination(folder: pathlib.Path, datasets: list[Dataset]) -> str:
    """Per dataset, rows at each rate beside the benchmark's own twins, what was not checked, and every removed pair."""
    parts = []
    for dataset in datasets:
        if dataset.manifest["stage"] != "decontaminate":
            continue
        config, counters = dataset.manifest["config"], dataset.counters
        parts.append(f"<h3>{_e(dataset.folder.name)}</h3>")
        rates: list[list[object]] = [
            [f"τ = {rate}", counters.get(f"ast_rate_{rate}", 0), f"{count} of {config['tasks']}"]
            for rate, count in config["own_twins"].items()
        ]
        head = ["AST match rate at least", "rows", "the benchmark's tasks with a twin among its own"]
        parts.append(_table(head, rates, frozenset({1})))
        names = (
            "small_trees_alone",
            *(f"removed_{test}" for test in decontaminate.TESTS),
            "kept_unchecked",
            "kept_with_other_languages",
            "kept_without_code",
        )
        parts.append(
            _table(
                ["counted", "rows"], [[name.replace("_", " "), counters.get(name, 0)] for name in names], frozenset({1})
            )
        )
        parts += _removed_pairs(folder, dataset)
    return "\n".join(parts)


def _diversity(datasets: list[Dataset]) -> str:
    """Near twins and Vendi score by sample size, and the whole measurement as a table, of datasets that have one."""
    measured = {dataset.folder.name: found for dataset in datasets if (found := diversity.read(dataset.folder))}
    if not measured:
        return ""

    def curves(name: str, scale: float) -> dict[str, tuple[list[float], list[float]]]:
        points = {folder: [p for p in found["points"] if name in p] for folder, found in measured.items()}
        return {folder: ([p["rows"] for p in ps], [scale * p[name] for p in ps]) for folder, ps in points.items()}

    parts = [
        '<p class="source">Of the texts with names, numbers, strings and examples masked. A near twin shares three '
        "quarters of its runs of five "
        "tokens with an earlier row. The Vendi score is the number of rows that would be as diverse if they had "
        "nothing in common.</p>",
        _plot(curves("near_twins", 100), "rows", "near twins of earlier rows, %", log_x=True),
        _plot(curves("vendi", 1), "rows", "Vendi score", log_x=True),
        _plot(
            curves(f"distinct_{diversity.DISTINCT[-1]}", 1), "rows", f"distinct-{diversity.DISTINCT[-1]}", log_x=True
        ),
    ]
    parts += [f"<h3>{_e(folder)}</h3>{_pre(diversity.describe(found))}" for folder, found in measured.items()]
    return "\n".join(parts)


def _removed_pairs(folder: pathlib.Path, dataset: Dataset) -> list[str]:
    reasons = {failure["key"]: failure["reason"] for failure in dataset.failures()}
    try:
        before = Dataset(folder / dataset.manifest["inputs"][0]["folder"])
        tasks = {problem.task_id: problem for problem in load(dataset.manifest["config"]["problems"])}
    except UserError as error:
        return [f'<p class="source">The removed pairs cannot be shown: {_e(error)}</p>'] if reasons else []
    parts = []
    for row in before.read(["hexsha", "content"]):
        if (reason := reasons.get(str(row["hexsha"]))) is None:
            continue
        task = next((tasks[word] for word in reason.split(": ")[1:2] if word in tasks), None)
        right = _pre(task.prompt + task.solution) if task else "<p>no task: it could not be compared</p>"
        pair = f'<div class="pair">{_pre(row["content"] or "")}{right}</div>'
        parts.append(f"<details><summary>{_e(reason[:160])}</summary>{pair}</details>")
    return parts


def _timings(folder: pathlib.Path) -> dict[str, float]:
    path = folder / "timings.json"
    if not path.exists():
        return {}
    with reading(path, "delete it"):
        return {name: float(seconds) for name, seconds in json.loads(path.read_text(encoding="utf-8")).items()}


def _failures(dataset: Dataset) -> str:
    failures = dataset.failures()
    if not failures:
        return ""
    lines = "\n".join(f"{failure['key'][:60]}: {failure['reason']}" for failure in failures[:20])
    return f"<details><summary>{len(failures):,} failures</summary>{_pre(lines, 4000)}</details>"


def _sample_rows(dataset: Dataset) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]]]:
    """A few rows spread over the dataset (the first of each tenth), and the best and the worst by quality, in one
    pass.
    """
    wanted = {i * dataset.rows // 10 for i in range(10)}
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    worst: dict[str, Any] | None = None
    for i, row in enumerate(dataset.read()):
        if i in wanted:
            rows.append(row)
        if "quality" in row:
            best = row if best is None or row["quality"] >= best["quality"] else best
            worst = row if worst is None or row["quality"] < worst["quality"] else worst
    ends = [("rated highest", best), ("rated lowest of those kept", worst)]
    return rows, [(label, row) for label, row in ends if row is not None]


def _samples(datasets: list[Dataset]) -> str:
    parts = []
    for dataset in datasets:
        if not dataset.rows:
            continue
        rows, shown = _sample_rows(dataset)
        if "content" not in rows[0]:
            continue
        text = [f"<h3>{_e(dataset.folder.name)}</h3>"]
        shown += [("", row) for row in rows[:3]]
        for label, row in shown:
            facts = [label] if label else []
            facts += [
                f"{key} {row[key]}"
                for key in ("source", "max_stars_repo_path", "topic", "audience", "family", "composition")
                if row.get(key)
            ]
            facts += [f"{key} {row[key]:.3f}" for key in ("quality", "score") if row.get(key) is not None]
            summary = _e(", ".join(facts)) or "row"
            text.append(f"<details><summary>{summary}</summary>{_pre(row['content'])}</details>")
        text.append(_failures(dataset))
        parts.append("\n".join(text))
    return "\n".join(parts)


def _trainings(folders: list[pathlib.Path]) -> str:
    losses: dict[str, tuple[list[float], list[float]]] = {}
    rows: list[list[object]] = []
    for folder in folders:
        with reading(folder / "metrics.jsonl", "delete the line, or leave that folder out"):
            whole = (folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]  # the last line may have been cut
            lines = [json.loads(line) for line in whole.split(b"\n") if line]
            steps = [line for line in lines if "loss" in line]
            checks: dict[str, list[tuple[float, float]]] = {}  # a curve for each held-out set
            for line in lines:
                for key in line:
                    if key.startswith("validation_loss"):
                        checks.setdefault(key.removeprefix("validation_loss"), []).append((line["step"], line[key]))
            if not steps:
                continue
            losses[f"{folder.name}: training"] = ([s["step"] for s in steps], _smooth([s["loss"] for s in steps]))
            for name, curve in checks.items():
                losses[f"{folder.name}: held out{name}"] = ([step for step, _ in curve], [loss for _, loss in curve])
            seconds = sum(step["seconds"] for step in steps)
            final = ", ".join(f"{curve[-1][1]:.3f} {name[1:]}".strip() for name, curve in checks.items()) or "–"
            rate = f"{steps[-1]['tokens'] / seconds:,.0f}" if seconds else "–"
            rows.append(
                [
                    folder.name,
                    steps[-1]["step"],
                    steps[-1]["tokens"],
                    f"{_smooth([s['loss'] for s in steps])[-1]:.3f}",
                    final,
                    rate,
                    f"{seconds:,.0f} s",
                ]
            )
    if not rows:
        return ""
    head = ["run", "steps", "tokens seen", "loss (nats a token)", "held-out loss", "tokens/s", "time"]
    return _table(head, rows, frozenset(range(1, 7))) + _plot(losses, "step", "loss, nats per token")


def _smooth(values: list[float], window: int = 20) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _answers(evaluations: list[pathlib.Path]) -> str:
    parts = []
    for path in evaluations:
        with reading(path, _EVALUATE):
            results = json.loads(path.read_text(encoding="utf-8"))
            samples = read_lines(path.parent / "samples.jsonl")
            text = [f"<h3>{_e(results['benchmark'])}, {_e(_checkpoint_name(results))}</h3>"]
            for status in ("passed", "failed"):
                for sample in [s for s in samples if s["status"] == status][:3]:
                    kind = "good" if status == "passed" else "bad"
                    label = f'<span class="{kind}">{status}</span> {_e(sample["task_id"])} {_e(sample["detail"][:100])}'
                    body = _pre(sample["program"])
                    text.append(f"<details><summary>{label}</summary>{body}</details>")
            parts.append("\n".join(text))
    return "\n".join(parts)


def _sources(folder: pathlib.Path, datasets: list[Dataset]) -> str:
    parts = [
        f'<p class="source">Rows, failures and counters: manifest.json of each dataset below {_e(folder)}. Losses and '
        f"times: metrics.jsonl of "
        "each training. Scores: results.json and samples.jsonl below evaluation/. Intervals are Wilson's, 95%.</p>"
    ]
    for dataset in datasets:
        manifest = dataset.manifest
        facts = {
            "config": manifest["config"],
            "inputs": manifest["inputs"],
            "hash": dataset.hash,
            "code_version": manifest["code_version"],
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        parts.append(
            f"<details><summary>{_e(dataset.folder.name)}: "
            f"{_e(manifest['stage'])}</summary>{_pre(text, 6000)}</details>"
        )
    return "\n".join(parts)
