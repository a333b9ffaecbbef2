"""Decontamination: which planted copies of a benchmark it finds, what it takes besides, and how fast it is.

    python bench/decontaminate.py --quick            # HumanEval; --problems mbpp.jsonl for another benchmark

Every task is planted once per kind of change: the solution with new names, other constants, reordered statements,
inside a quotation, beside a shell's block, … Recall is the share that is removed at each τ (`--ast-rate`). Beside it
stand two bodies of code that were not made from the benchmark: functions of installed packages, and the offline
teacher's exercises where they are asked for. Precision at τ is planted rows removed over all rows removed, of as many
planted as clean rows.

The speed is that of the paper's exercises: 879,500 functions against the benchmark's, after parsing them.
"""

import argparse
import ast
import copy
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools import embed, python_text, similarity
from data_tools.decontaminate import RATES, Benchmark, Config
from data_tools.tasks import entry, load
from phi1.evaluate.humaneval import Problem

EXERCISES = 879_500
"""The paper's."""
PACKAGES = ("more_itertools", "toolz", "boltons", "networkx", "sympy")


# ---------------------------------------------------------------- changes


class _Renamer(ast.NodeTransformer):
    """Other names for all that the function names itself, another docstring, no annotations."""

    def __init__(self, function: ast.AST) -> None:
        nodes = list(ast.walk(function))
        self.names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name(f"zz_{node.id}" if node.id in self.names else node.id, node.ctx), node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.copy_location(ast.arg(f"zz_{node.arg}"), node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        node.arg = f"zz_{node.arg}" if node.arg in self.names else node.arg
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.name, node.returns = f"zz_{node.name}", None
        if ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("Do it."))
        return node


class _Constants(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) in (int, float):
            return ast.Constant(node.value + 3)  # type: ignore[operator]
        if isinstance(node.value, str) and node.value != "Do it.":
            return ast.Constant(f"{node.value}!")
        return node


def _tree(problem: Problem) -> ast.FunctionDef:
    function = copy.deepcopy(entry(problem))
    assert isinstance(function, ast.FunctionDef)
    return function


def _text(function: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(function)) + "\n"


def _renamed(problem: Problem) -> ast.FunctionDef:
    function = _tree(problem)
    renamed = _Renamer(function).visit(function)
    assert isinstance(renamed, ast.FunctionDef)
    return renamed


def renamed(problem: Problem) -> str:
    return _text(_renamed(problem))


def constants(problem: Problem) -> str:
    return _text(_Constants().visit(_renamed(problem)))


def _start(function: ast.FunctionDef) -> int:
    return int(ast.get_docstring(function) is not None)


def reordered(problem: Problem) -> str | None:
    """The first two statements of the first body that has two before its last, the other way round; None if there is
    none.
    """
    function = _renamed(problem)
    for node in ast.walk(function):
        body = getattr(node, "body", None)
        if isinstance(body, list) and node is not function and len(body) > 1:
            body[0], body[1] = body[1], body[0]
            return _text(function)
        if node is function and len(function.body) > _start(function) + 2:
            at = _start(function)
            function.body[at], function.body[at + 1] = function.body[at + 1], function.body[at]
            return _text(function)
    return None


def one_more(problem: Problem) -> str:
    function = _renamed(problem)
    function.body.insert(_start(function), ast.parse("zz_seen = 0").body[0])
    return _text(function)


def docstring(problem: Problem) -> str:
    """The solution as it is, under another docstring."""
    function = _tree(problem)
    function.body[: _start(function)] = [ast.Expr(ast.Constant("Work on what is given, and hand back the outcome."))]
    return _text(function)


def _in_text(block: str) -> str:
    return f"First the idea, in a few words.\n\n{block}\nThat is all there is to it.\n"


def _indented(text: str, by: str = "    ") -> str:
    return "".join(f"{by}{line}\n" if line else f"{by.rstrip()}\n" for line in text.rstrip("\n").split("\n"))


def _python2_inside(problem: Problem) -> str:
    function = _renamed(problem)
    lines = _text(function).split("\n")
    at = function.body[_start(function)]
    body = ast.unparse(at).split("\n")[0]
    where = next(i for i, line in enumerate(lines) if line.strip() == body.strip())
    return "\n".join([*lines[:where], "    print 'here'", *lines[where:]])


def _fenced(code: str, mark: str = "```", language: str = "python") -> str:
    return f"{mark}{language}\n{code}{mark}\n"


CHANGES: dict[str, Callable[[Problem], str | None]] = {
    "verbatim": lambda p: p.prompt + p.solution if p.solution.startswith((" ", "\t", "\n")) else p.solution,
    "docstring rewritten": docstring,
    "renamed": renamed,
    "renamed, other constants": constants,
    "statements reordered": reordered,
    "one statement more": one_more,
    "Python 2 line after it": lambda p: renamed(p) + "\nprint 'done'\n",
    "Python 2 line in it": _python2_inside,
    "BOM": lambda p: "\ufeff" + renamed(p),
    "CRLF": lambda p: renamed(p).replace("\n", "\r\n"),
    "fenced by ```": lambda p: _in_text(_fenced(renamed(p))),
    "fenced by ~~~": lambda p: _in_text(_fenced(renamed(p), "~~~~")),
    "second block is shell": lambda p: _in_text(
        _fenced(renamed(p)) + "\nRun it:\n\n" + _fenced("$ python it.py | less\n", language="sh")
    ),
    "second block is Python 2": lambda p: _in_text(_fenced(renamed(p)) + "\n" + _fenced("print 'done'\n")),
    "indented block": lambda p: _in_text(_indented(renamed(p))),
    "block in a list": lambda p: _in_text("1. See:\n\n   ```\n" + _indented(renamed(p), "   ") + "   ```\n"),
    "block in a quotation": lambda p: _in_text(_indented(_fenced(renamed(p)), "> ")),
    "fence left open": lambda p: "So:\n\n```python\n" + renamed(p),
    "reST": lambda p: _in_text(".. code-block:: python\n\n" + _indented(renamed(p))),
    "HTML": lambda p: (
        "<p>So:</p><pre><code>"
        + renamed(p).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        + "</code></pre>\n"
    ),
    "interpreter's prompts": lambda p: _in_text(">>> " + _indented(renamed(p), "... ")[4:]),
    "in a docstring": lambda p: (
        f"class Notes:\n    '''Keep.\n\n{_indented(renamed(p)).replace(chr(39) * 3, '')}    '''\n"
    ),
    "commented out": lambda p: "import os\n" + _indented(renamed(p), "# ") + "x = 1\n",
    "notebook": lambda p: json.dumps(
        {"cells": [{"cell_type": "code", "source": renamed(p).splitlines(keepends=True)}]}
    ),
    "JSON lines": lambda p: "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(("prose", renamed(p)))
    ),
    "numbered lines": lambda p: _in_text(
        "".join(f"{n:>4}  {line}\n" for n, line in enumerate(renamed(p).rstrip().split("\n"), 98))
    ),
    "a diff": lambda p: "@@ -0,0 +1 @@\n" + _indented(renamed(p), "+"),
    "a method": lambda p: (
        "class Zz:\n" + _indented(renamed(p)).replace("(", "(self, ", 1).replace("(self, )", "(self)")
    ),
    "tabs": lambda p: renamed(p).replace("    ", "\t"),
    "cut off": lambda p: renamed(p).rstrip("\n") + " + (\n",
}


# ---------------------------------------------------------------- recall and precision


def planted(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Per kind of change, the texts of the tasks that it can be made of."""
    return {kind: [text for text in map(change, problems) if text is not None] for kind, change in CHANGES.items()}


def verdicts(benchmark: Benchmark, texts: Sequence[str]) -> list[tuple[bool, float, bool]]:
    """Per text: whether 13-grams take it, its best rate by tree or tokens, whether it could not be checked."""
    found = []
    for text, about in zip(texts, benchmark.check(texts), strict=True):
        grams = any(gram in benchmark.ngrams for gram in similarity.ngrams(text, benchmark.config.ngram))
        best = max((match.rate for match in (about.best, about.by_tokens) if match), default=0)
        found.append((grams, float(best), bool(about.unread)))
    return found


def functions(packages: Sequence[str] = PACKAGES) -> Iterator[tuple[str, str]]:
    """Functions of installed packages, without repeats: source, and serialised tree."""
    seen = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "tests" in path.parts:
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = text.split("\n")
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.FunctionDef):
                    continue
                tree = similarity.serialise(node)
                if tree not in seen:
                    seen.add(tree)
                    yield "\n".join(lines[node.lineno - 1 : node.end_lineno]) + "\n", tree


def table(problems: Sequence[str], clean: Sequence[str], serialisations: Sequence[Any]) -> dict[str, Any]:
    """Recall at each τ by kind of change; clean rows that go at each τ; precision."""
    config = Config(
        input=Path(),
        output=Path(),
        problems=tuple(problems),
        ast_rate=min(RATES),
        embedder="none",
        serialisations=tuple(serialisations),
    )
    benchmark = Benchmark(config, exercises=False)
    sets = planted(benchmark.problems)
    rows: list[dict[str, Any]] = []
    for kind, texts in sets.items():
        found = verdicts(benchmark, texts)
        rows.append(
            {
                "change": kind,
                "planted": len(texts),
                "ngram": sum(grams for grams, _, _ in found),
                "unchecked": sum(unread for _, _, unread in found),
                "ast": {f"{rate:.2f}": sum(best >= rate - 1e-9 for _, best, _ in found) for rate in RATES},
                "removed": {
                    f"{rate:.2f}": sum(grams or unread or best >= rate - 1e-9 for grams, best, unread in found)
                    for rate in RATES
                },
            }
        )
    about = verdicts(benchmark, clean)
    taken = {
        f"{rate:.2f}": sum(grams or unread or best >= rate - 1e-9 for grams, best, unread in about) for rate in RATES
    }
    for row in rows:
        row["precision"] = {}
        for rate, removed in row["removed"].items():
            right = removed / max(1, row["planted"])
            wrong = taken[rate] / max(1, len(clean))
            row["precision"][rate] = right / (right + wrong) if right + wrong else None
    small = benchmark.facts["small_tasks"]
    return {
        "tasks": len(benchmark.problems),
        "small_tasks": small,
        "own_twins": benchmark.facts["own_twins"],
        "rows": rows,
        "clean": len(clean),
        "clean_removed": taken,
        "clean_ngram": sum(grams for grams, _, _ in about),
        "clean_unchecked": sum(unread for _, _, unread in about),
    }


def show(result: dict[str, Any]) -> str:
    """The table as text."""
    taus = [f"{rate:.2f}" for rate in RATES]
    lines = [
        f"{result['tasks']} tasks, {result['small_tasks']} of them small; twins among its own at τ "
        + ", ".join(f"{tau}: {result['own_twins'][tau]}" for tau in taus),
        f"{'':<28}{'planted':>8}{'13-gram':>9}"
        + "".join(f"{'τ ' + tau:>9}" for tau in taus)
        + f"{'unchecked':>11}  recall of all tests; precision",
    ]
    for row in result["rows"]:
        n = row["planted"]
        lines.append(
            f"{row['change']:<28}{n:>8}{100 * row['ngram'] / n:>8.1f}%"
            + "".join(f"{100 * row['ast'][tau] / n:>8.1f}%" for tau in taus)
            + f"{row['unchecked']:>11}  "
            + " ".join(f"{100 * row['removed'][tau] / n:.1f}" for tau in taus)
            + "; "
            + " ".join(f"{100 * row['precision'][tau]:.1f}" for tau in taus)
        )
    n = max(1, result["clean"])
    lines.append(
        f"{'clean functions':<28}{n:>8}{100 * result['clean_ngram'] / n:>8.1f}%"
        + "".join(f"{100 * result['clean_removed'][tau] / n:>8.1f}%" for tau in taus)
        + f"{result['clean_unchecked']:>11}"
    )
    return "\n".join(lines)


def embedded(problems: Sequence[str], clean: Sequence[str], embedder: str) -> dict[str, Any]:
    """Per kind of change that the trees do not see through, the share whose nearest task is its own, and that within
    the default distance; of clean rows, those within it.
    """
    import numpy

    config = Config(input=Path(), output=Path(), problems=tuple(problems), embedder=embedder)
    benchmark = Benchmark(config, exercises=False, embedder=embed.resolve(embedder))
    tasks = benchmark._benchmark_vectors
    found: dict[str, Any] = {}
    for kind in (
        "docstring rewritten",
        "renamed",
        "renamed, other constants",
        "statements reordered",
        "one statement more",
    ):
        pairs = [(i, text) for i, p in enumerate(benchmark.problems) if (text := CHANGES[kind](p)) is not None]
        vectors = benchmark._embedded([text for _, text in pairs])
        distance = numpy.sqrt((2 - 2 * vectors @ tasks.T).clip(min=0))
        own = numpy.array([i for i, _ in pairs])
        found[kind] = {
            "planted": len(pairs),
            "nearest is its own": float((distance.argmin(1) == own).mean()),
            "within": float((distance.min(1) <= config.embedding_distance).mean()),
        }
    distance = numpy.sqrt((2 - 2 * benchmark._embedded(list(clean)) @ tasks.T).clip(min=0))
    found["clean functions"] = {
        "planted": len(clean),
        "nearest is its own": None,
        "within": float((distance.min(1) <= config.embedding_distance).mean()),
    }
    return {"embedder": benchmark.facts["embedding_model"], "distance": config.embedding_distance, "rows": found}


# ---------------------------------------------------------------- speed


def speed(problems: Sequence[str], trees: Sequence[str], count: int) -> dict[str, Any]:
    """CPU seconds to compare `count` different trees, real ones with one node changed each, with all tasks."""
    rng = random.Random(0)
    alphabet = sorted(set("".join(trees)))
    many: set[str] = set(trees[:count])
    while len(many) < count:
        tree = rng.choice(trees)
        at = rng.randrange(len(tree))
        many.add(tree[:at] + rng.choice(alphabet) + rng.choice(alphabet) + tree[at + 1 :])
    tasks = [similarity.serialise(entry(problem)) for problem in load(problems)]
    everything = sorted(many)
    rng.shuffle(everything)
    started = time.process_time()
    near = sum(1 for _ in similarity.near_pairs(everything, tasks, similarity.exact(min(RATES))))
    seconds = time.process_time() - started
    return {"trees": count, "tasks": len(tasks), "near": near, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["humaneval"], help="humaneval, or files of problems")
    parser.add_argument("--quick", action="store_true", help="2,000 clean functions, a tenth of the exercises")
    parser.add_argument("--each", action="store_true", help="a table for each serialisation alone as well")
    parser.add_argument(
        "--teacher", type=int, default=0, help="also so many exercises of the offline teacher, as clean rows"
    )
    parser.add_argument("--embedder", default="none", help="also the share that an embedding finds, e.g. minilm")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON, with the machine they are of")
    options = parser.parse_args()
    found = list(functions(PACKAGES[:4] if options.quick else PACKAGES))
    started = time.process_time()
    trees = [similarity.serialise(node) for source, _ in found for node in python_text.find(source).functions]
    parse = {"functions": len(trees), "seconds": time.process_time() - started}
    rng = random.Random(0)
    clean = rng.sample([source for source, _ in found], min(len(found), 2000 if options.quick else 10_000))
    tables = {}
    ways = [("preorder", "sorted"), *([("preorder",), ("brackets",), ("sorted",)] if options.each else [])]
    for way in ways:
        name = " + ".join(way)
        tables[name] = table(options.problems, clean, way)
        print(f"{name}, clean rows: functions of {', '.join(PACKAGES)}\n{show(tables[name])}\n")
    if options.teacher:
        from data_tools import teacher

        rows = teacher.write_exercises(options.teacher, "bench", "train", {})
        exercises = [row["prompt"] + row["solution"] for row in rows]
        tables["teacher"] = table(options.problems, exercises, ways[0])
        print(f"{' + '.join(ways[0])}, clean rows: the offline teacher's exercises\n{show(tables['teacher'])}\n")
    if options.embedder != "none":
        tables["embedding"] = embedded(options.problems, clean[:300], options.embedder)
        print(f"{tables['embedding']['embedder']}, L2 distance at most {tables['embedding']['distance']}")
        for kind, row in tables["embedding"]["rows"].items():
            own = (
                ""
                if row["nearest is its own"] is None
                else f"{100 * row['nearest is its own']:>8.1f}% nearest to their own task"
            )
            print(f"{kind:<28}{row['planted']:>8}{100 * row['within']:>8.1f}% within{own}")
        print()
    fast = speed(options.problems, [tree for _, tree in found], EXERCISES // 10 if options.quick else EXERCISES)
    print(
        f"{fast['trees']:,} different trees against {fast['tasks']}: {fast['seconds']:.1f} s of CPU time "
        f"({fast['near']:,} pairs at {min(RATES)}); "
        f"{parse['functions']:,} functions found and serialised in {parse['seconds']:.1f} s"
    )
    if options.output:
        from bench.harness import environment

        facts = {"environment": environment("cpu"), "tables": tables, "speed": fast, "parse": parse}
        options.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
