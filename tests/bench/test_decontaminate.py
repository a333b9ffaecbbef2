"""The table of planted changes and the speed figure, of a few tasks."""

import json
import pathlib

from bench import decontaminate
from phi1.evaluate import humaneval


def few(folder: pathlib.Path) -> str:
    problems = [humaneval.load()[i] for i in (1, 9, 53, 129)]
    rows = [
        {
            "task_id": p.task_id,
            "prompt": p.prompt,
            "entry_point": p.entry_point,
            "test": p.test,
            "canonical_solution": p.solution,
        }
        for p in problems
    ]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "few.jsonl")


def test_recall_and_precision_by_kind_of_change(tmp_path: pathlib.Path) -> None:
    clean = [source for source, _ in decontaminate.functions(("toolz",))][:40]
    result = decontaminate.table([few(tmp_path)], clean, ("preorder", "sorted"))
    assert result["tasks"] == 4 and result["small_tasks"] == 1 and result["clean"] == 40
    rows = {row["change"]: row for row in result["rows"]}
    assert set(rows) == set(decontaminate.CHANGES) and len(rows) >= 25
    assert rows["verbatim"]["removed"]["0.95"] == 4 and rows["renamed"]["removed"]["0.95"] == 3  # `return x + y` hides
    assert rows["cut off"]["unchecked"] == 4 and rows["statements reordered"]["planted"] == 3
    more = rows["one statement more"]["removed"]
    assert more["0.95"] <= more["0.80"] and more["0.80"] == 3
    wrong = result["clean_removed"]["0.95"]  # toolz' docstrings show `def add(x, y): return x + y`
    assert wrong <= 4 and rows["verbatim"]["precision"]["0.95"] == 1 / (1 + wrong / 40)
    lines = decontaminate.show(result).split("\n")
    assert len(lines) == 3 + len(rows) and "4 tasks, 1 of them small" in lines[0] and "clean functions" in lines[-1]


def test_speed_compares_as_many_trees_as_it_says(tmp_path: pathlib.Path) -> None:
    trees = [tree for _, tree in decontaminate.functions(("toolz",))]
    found = decontaminate.speed([few(tmp_path)], trees, 500)
    assert found["trees"] == 500 and found["tasks"] == 4 and found["seconds"] > 0
