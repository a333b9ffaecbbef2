"""Completes the functions of a benchmark, runs them in the sandbox, prints and writes the score.

A folder is written: samples.jsonl (one line per completion, appended as they come: started again, it goes on
after them), settings.json (what was run) and results.json (the score, with its interval).
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from phi1.errors import UserError
from phi1.evaluate import answers, exercises, humaneval, judge, sandbox
from phi1.evaluate.humaneval import Problem
from phi1.evaluate.passk import interval, pass_at_k
from phi1.files import sha256_json, write_json

Generate = Callable[[Sequence[str], int], list[str]]
"""generate(prompts, seed) -> completions"""
CHUNK = 64
"""Completions between two writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 evaluate`."""

    checkpoint: pathlib.Path
    """Checkpoint folder, or a run's folder (its newest checkpoint)."""
    benchmark: Literal["humaneval", "exercises"] = "humaneval"
    """humaneval: its 164 problems. exercises: held-out exercises (--exercises)."""
    exercises: pathlib.Path | None = None
    """Dataset folder of held-out exercises, written by `phi1 data synthesize`."""
    problems: pathlib.Path | None = None
    """A .jsonl or .jsonl.gz in HumanEval's columns instead of the installed package's."""
    output: pathlib.Path | None = None
    """Folder for samples and results (default: CHECKPOINT-BENCHMARK beside the checkpoint)."""
    samples: int = 1
    """Completions per problem."""
    k: tuple[int, ...] = (1, 10, 100)
    """The k of pass@k; those above --samples are left out."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Nucleus sampling: the smallest set of tokens with at least this probability (temperature > 0)."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    batch_size: int = 16
    """Prompts completed at a time."""
    limit: int | None = None
    """Only the first so many problems."""
    seed: int = 0
    """Seed of sampling."""
    timeout: float = sandbox.TIMEOUT
    """Seconds for a program and its test: of CPU time, and of waiting."""
    workers: int = 2
    """Programs that run at a time."""
    allow_weak_sandbox: bool = False
    """Run untrusted programs even where the kernel does not keep them in (docs/sandbox.md)."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    judge_model: str | None = None
    """Also have this model grade the first completion of each problem, 0–10."""
    judge_url: str | None = None
    """URL of the judge's OpenAI-compatible server (key in OPENAI_API_KEY; default: OpenAI's)."""


def run(config: Config) -> None:
    """Runs the benchmark and prints its table."""
    if config.samples < 1:
        raise UserError(f"--samples {config.samples}: must be at least 1")
    if config.samples > 1 and config.temperature == 0:
        raise UserError(f"--samples {config.samples} with --temperature 0 gives equal samples: set e.g. 0.2 or 0.8")
    problems = _problems(config)
    checkpoint, generate = _generator(config)
    output = config.output or checkpoint.parent / f"{checkpoint.name}-{config.benchmark}"
    settings = {
        "benchmark": config.benchmark,
        "checkpoint": _digest(checkpoint),
        "problems": sha256_json([dataclasses.asdict(problem) for problem in problems]),
        **{name: getattr(config, name) for name in ("samples", "temperature", "top_p", "max_new_tokens", "seed", "timeout")},
    }  # fmt: skip
    strength = sandbox.strength()
    print(f"sandbox: {strength}", file=sys.stderr)
    if strength.level == "weak" and not config.allow_weak_sandbox:
        raise UserError(
            f"the sandbox cannot keep programs in on this machine: {'; '.join(strength.missing)}; use another, or "
            "--allow-weak-sandbox where you would run the model's programs without a sandbox"
        )
    rows = sample(problems, generate, output, settings, config)
    results = settings | {"checkpoint_folder": str(checkpoint), "sandbox": dataclasses.asdict(strength)}
    results |= score(problems, rows, config.k)
    if config.judge_model is not None:
        first = {row["task_id"]: row["completion"] for row in rows if row["sample"] == 0}
        grades = judge.grade(
            problems,
            [first[problem.task_id] for problem in problems],
            judge.openai_ask(config.judge_url, config.judge_model),
            progress=_progress("judged"),
        )
        results["judge"] = {"model": config.judge_model} | judge.summary(grades)
        write_json(output / "grades.json", [dataclasses.asdict(one) for one in grades])
    write_json(output / "results.json", results)
    print(table(results))
    print(f"written: {output / 'results.json'}")


def _problems(config: Config) -> list[Problem]:
    if config.benchmark == "exercises":
        if config.exercises is None:
            raise UserError("--benchmark exercises needs --exercises FOLDER, a dataset of held-out exercises")
        problems = exercises.load(config.exercises)
    else:
        problems = humaneval.load(config.problems)
    return problems[: config.limit]


def _generator(config: Config) -> tuple[pathlib.Path, Generate]:
    import torch

    from phi1 import checkpoint
    from phi1.generate import complete

    folder = checkpoint.resolve(config.checkpoint)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model, tokenizer = checkpoint.load_model(folder, device=device)
    model.eval()

    def generate(prompts: Sequence[str], seed: int) -> list[str]:
        return complete(
            model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            top_p=config.top_p, stop=answers.STOP, seed=seed, batch_size=config.batch_size,
        )  # fmt: skip

    return folder, generate


def _digest(checkpoint: pathlib.Path) -> str:
    from phi1.checkpoint import digest

    return digest(checkpoint)


def sample(
    problems: Sequence[Problem], generate: Generate, output: pathlib.Path, settings: dict[str, Any], config: Config
) -> list[dict[str, Any]]:
    """Completes and runs what `output`/samples.jsonl does not hold yet; returns all rows.

    A row: task_id, sample, prompt, completion, status, detail, seconds, cpu_seconds, in the order in which they were
    done. Raises UserError if the folder holds samples of
    another checkpoint, benchmark or sampling.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, before = output / "samples.jsonl", output / "settings.json"
    if before.exists() and json.loads(before.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{output}: holds the samples of other settings or another checkpoint; choose another --output")
    write_json(before, settings)
    rows = _read_samples(path)
    by_id = {problem.task_id: problem for problem in problems}
    done = {(row["task_id"], row["sample"]) for row in rows}
    todo = [(task_id, i) for i in range(config.samples) for task_id in by_id if (task_id, i) not in done]
    report = _progress("completed and run")
    for start in range(0, len(todo), CHUNK):
        chunk = todo[start : start + CHUNK]
        completions = generate([by_id[task_id].prompt for task_id, _ in chunk], config.seed + len(rows))
        # The model's loop cuts at the first stop string too; cutting here makes the score independent of it.
        completions = [answers.cut(completion) for completion in completions]
        jobs = [by_id[task_id].job(text, config.timeout) for (task_id, _), text in zip(chunk, completions, strict=True)]
        with open(path, "a", encoding="utf-8") as file:
            for place, result in sandbox.run_each(jobs, workers=config.workers):
                task_id, i = chunk[place]
                row = {"task_id": task_id, "sample": i, "prompt": by_id[task_id].prompt, "completion": completions[place],
                       "status": result.status, "detail": result.detail, "seconds": round(result.seconds, 4),
                       "cpu_seconds": round(result.cpu, 4)}  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()  # as they come: what ended this process would not end them
                rows.append(row)
            os.fsync(file.fileno())
        report(start + len(chunk), len(todo))
    return [row for row in rows if row["task_id"] in by_id]


def _read_samples(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; a last line that was cut short is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, torn = text.rpartition("\n")
    if torn:
        with open(path, "r+", encoding="utf-8") as file:
            file.truncate(len((whole + "\n").encode()) if whole else 0)
    return [json.loads(line) for line in whole.splitlines()]


def score(problems: Sequence[Problem], rows: Sequence[dict[str, Any]], ks: Sequence[int] = (1,)) -> dict[str, Any]:
    """pass@k with 95% intervals over all problems and per group, and the count of each status."""
    outcomes: dict[str, list[bool]] = {problem.task_id: [] for problem in problems}
    statuses: dict[str, int] = {}
    for row in rows:
        outcomes[row["task_id"]].append(row["status"] == "passed")
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    samples = min(len(passed) for passed in outcomes.values())
    groups = {"all": list(problems)}
    for problem in problems:
        if problem.group:
            groups.setdefault(problem.group, []).append(problem)
    scores = []
    for group, members in groups.items():
        for k in ks:
            if k <= samples:
                values = [pass_at_k(len(o := outcomes[p.task_id]), sum(o), k) for p in members]
                low, high = interval(values)
                scores.append({"group": group, "problems": len(members), "k": k,
                               "pass": sum(values) / len(values), "low": low, "high": high})  # fmt: skip
    return {"scores": scores, "statuses": statuses}


def table(results: dict[str, Any]) -> str:
    """The score as text."""
    lines = [f"{results['benchmark']}, {results['samples']} sample(s) a problem, temperature {results['temperature']:g}",
             f"{'':<12}{'problems':>9}{'pass@k':>10}{'':>9}  95% interval"]  # fmt: skip
    for row in results["scores"]:
        lines.append(f"{row['group']:<12}{row['problems']:>9}{'pass@' + str(row['k']):>10}{100 * row['pass']:>8.1f}%"
                     f"  {100 * row['low']:.1f}–{100 * row['high']:.1f}%")  # fmt: skip
    lines.append("outcomes: " + ", ".join(f"{status} {count}" for status, count in sorted(results["statuses"].items())))
    if "judge" in results:
        grades = results["judge"]
        mean = grades["grade_percent"]
        lines.append(
            f"judge {grades['model']}: " + ("no grade" if mean is None else f"{mean:.0f}% "
            f"({grades['interval_percent'][0]:.0f}–{grades['interval_percent'][1]:.0f}%)")
            + f", {grades['graded']} graded, {grades['without_grade']} without a grade"
        )  # fmt: skip
    return "\n".join(lines)


def _progress(what: str) -> Callable[[int, int], None]:
    started = time.monotonic()

    def report(done: int, count: int) -> None:
        left = (time.monotonic() - started) / done * (count - done)
        print(f"evaluate: {what} {done}/{count}  ETA {left:,.0f} s", file=sys.stderr, flush=True)

    return report
