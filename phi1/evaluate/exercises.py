"""Held-out exercises as problems: read from a dataset folder that `phi1 data synthesize` wrote."""

import json
import pathlib

from phi1.errors import UserError
from phi1.evaluate.humaneval import Problem
from phi1.files import sha256_file

COLUMNS = ("prompt", "entry_point", "test", "solution", "composition")


def load(folder: pathlib.Path) -> list[Problem]:
    """The exercises in a dataset folder, grouped by "one step" and "two steps".

    Raises UserError if the folder is not a whole dataset of exercises, or a shard is not what its manifest says.
    """
    import pyarrow.parquet

    manifest = folder / "manifest.json"
    try:
        shards = json.loads(manifest.read_text(encoding="utf-8"))["shards"]
        hashes = [shard["sha256"] for shard in shards]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not a whole dataset ({type(error).__name__} in {manifest.name}); "
            "write it with `phi1 data synthesize --kind exercises`"
        ) from error
    problems: list[Problem] = []
    for number, expected in enumerate(hashes):
        path = folder / f"{number:05d}.parquet"
        if not path.exists() or sha256_file(path) != expected:
            raise UserError(f"{path}: corrupt shard (missing, or not the manifest's SHA-256); make the dataset again")
        missing = set(COLUMNS) - set(pyarrow.parquet.read_schema(path).names)
        if missing:
            raise UserError(f"{folder}: no exercises there (no column {', '.join(sorted(missing))})")
        for row in pyarrow.parquet.read_table(path, columns=list(COLUMNS)).to_pylist():
            group = "two steps" if "+" in (row["composition"] or "") else "one step"
            task_id = f"exercise/{len(problems)}"
            prompt, entry_point, test, solution = (
                row[name] or "" for name in ("prompt", "entry_point", "test", "solution")
            )
            problems.append(Problem(task_id, prompt, entry_point, test, solution, group))
    if not problems:
        raise UserError(f"{folder}: holds no exercise")
    return problems
