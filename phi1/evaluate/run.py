"""Completes the functions of a benchmark, runs them in the sandbox, prints and writes the score.

The model is a checkpoint, a Hugging Face folder (--checkpoint), or a server (--model-url, --model).

A folder is written, by one evaluation at a time: samples.jsonl (one line per completion, appended as they come: started
again, it goes on after them, and asks again where no answer came), settings.json (what was run) and results.json (the
score, with its intervals).
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from phi1.errors import UserError
from phi1.evaluate import answers, exercises, humaneval, judge, models, puzzles, sandbox
from phi1.evaluate.humaneval import Problem
from phi1.evaluate.models import Model, Refused, Unserved
from phi1.evaluate.passk import bootstrap, interval, pass_at_k
from phi1.files import atomic_write, claim, lock_folder, sha256_json, write_json
from phi1.progress import Progress

CHUNK = 64
"""Completions between two writes."""
OUTPUT = 2000
"""Characters of a program's output that are kept in its row."""
FEW = 3
"""Prompts that may all fail by a server that answered others; where more do, it is the server."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 evaluate`."""

    checkpoint: pathlib.Path | None = None
    """Checkpoint folder, a run's folder (its newest checkpoint), or a Hugging Face folder."""
    model_url: str | None = None
    """URL of an OpenAI-compatible server that has the model (key in OPENAI_API_KEY), instead of --checkpoint."""
    model: str | None = None
    """The model's name at that server; without --model-url, at OpenAI's."""
    chat: bool = False
    """Ask the server's model by chat instead of having it go on with the prompt."""
    benchmark: Literal["humaneval", "exercises", "puzzles"] = "humaneval"
    """humaneval: its 164 problems, or those of --problems. exercises: held-out exercises (--exercises). puzzles: 50
    unconventional problems in the spirit of the paper's section 4, whose own were not published."""
    exercises: pathlib.Path | None = None
    """Dataset folder of held-out exercises, written by `phi1 data synthesize`."""
    problems: pathlib.Path | None = None
    """A file of problems instead of the installed HumanEval: .jsonl, .jsonl.gz or .json of HumanEval, HumanEval+, MBPP
    or MBPP+.
    """
    output: pathlib.Path | None = None
    """Folder for samples and results (default: CHECKPOINT-BENCHMARK beside the checkpoint; needed with --model)."""
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
    answer_timeout: float = 300.0
    """Seconds for one answer of a server."""
    workers: int = 2
    """Programs that run at a time, and requests to a server."""
    allow_weak_sandbox: bool = False
    """Run untrusted programs even where the kernel does not keep them in (docs/sandbox.md)."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    judge_model: str | None = None
    """Also have this model grade the first completion of each problem, 0–10."""
    judge_url: str | None = None
    """URL of the judge's OpenAI-compatible server (key in OPENAI_API_KEY; default: OpenAI's)."""
    judge_repeats: int = 1
    """Grades of each completion; the variance between them is reported."""


def run(config: Config) -> None:
    """Runs the benchmark and prints its table."""
    for name in ("samples", "workers", "judge_repeats", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if min(config.k, default=1) < 1 or (config.limit is not None and config.limit < 1):
        raise UserError(f"--k {' '.join(map(str, config.k))}, --limit {config.limit}: must be at least 1")
    for name in ("timeout", "answer_timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be a number of seconds above 0")
    if all(k > config.samples for k in config.k):
        raise UserError(
            f"--k {' '.join(map(str, config.k))} with --samples {config.samples}: pass@k needs k samples of a "
            f"problem; lower --k, or raise --samples"
        )
    if config.samples > 1 and config.temperature == 0:
        raise UserError(f"--samples {config.samples} with --temperature 0 gives equal samples: set e.g. 0.2 or 0.8")
    if (config.checkpoint is None) == (config.model is None):
        raise UserError("name the model: --checkpoint FOLDER, or --model NAME of a server (--model-url), one of them")
    if config.checkpoint is None and config.output is None:
        raise UserError("--output is missing: the folder for the results of a server's model")
    problems = load_problems(config)
    model = load_model(config)
    output = config.output or pathlib.Path(model.name).with_name(f"{pathlib.Path(model.name).name}-{config.benchmark}")
    identity = settings(config, problems, model.hash, model.tokenizer)
    strength = sandbox.strength()
    print(f"sandbox: {strength}", file=sys.stderr)
    if strength.level == "weak" and not config.allow_weak_sandbox:
        raise UserError(
            f"the sandbox cannot keep programs in on this machine: {'; '.join(strength.missing)}; use another, or "
            "--allow-weak-sandbox where you would run the model's programs without a sandbox"
        )
    with lock_folder(output, "evaluation", "--output"):
        rows = sample(problems, model, output, identity, config, strength.level)
        results = identity | {"checkpoint_folder": model.name, "sandbox": dataclasses.asdict(strength)}
        results |= score(problems, rows, config.k)
        write_json(output / "results.json", results)  # before a judge has its say: what was run is kept
        if config.judge_model is not None:
            try:
                grades = _judged(problems, rows, config, output)
            except BaseException:
                print(table(results))  # what was run has its score, whatever ends the judge
                raise
            passed = {
                row["task_id"]: row["status"] == "passed" for row in rows if row["sample"] == 0 and row["status"] in RAN
            }
            results["judge"] = {"model": config.judge_model} | judge.summary(grades, passed)
            write_json(output / "grades.json", [dataclasses.asdict(one) for one in grades])
            write_json(output / "results.json", results)
    print(table(results))
    print(f"written: {output / 'results.json'}")


def settings(config: Config, problems: Sequence[Problem], checkpoint: str, tokenizer: str) -> dict[str, Any]:
    """What samples are of, as settings.json holds it; checkpoint, tokenizer: their hashes."""
    names = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "timeout")
    return {
        "benchmark": config.benchmark,
        "checkpoint": checkpoint,
        "tokenizer": tokenizer,
        "problems": sha256_json([dataclasses.asdict(problem) for problem in problems]),
        **{name: getattr(config, name) for name in names},
    }


RAN = ("passed", "failed", "timed_out")
"""Statuses of a program that was judged by its test."""


def load_problems(config: Config) -> list[Problem]:
    """The benchmark's problems."""
    if config.benchmark == "exercises":
        if config.exercises is None:
            raise UserError("--benchmark exercises needs --exercises FOLDER, a dataset of held-out exercises")
        problems = exercises.load(config.exercises)
    elif config.benchmark == "puzzles":
        problems = puzzles.load()
    else:
        problems = humaneval.load(config.problems)
    return problems[: config.limit]


def load_model(config: Config) -> Model:
    """The model that the options name."""
    sampling = models.Sampling(config.max_new_tokens, config.temperature, config.top_p, config.batch_size)
    if config.model is not None:
        return models.load_server(
            config.model_url,
            config.model,
            sampling,
            chat=config.chat,
            workers=config.workers,
            timeout=config.answer_timeout,
        )
    assert config.checkpoint is not None
    return models.load_folder(config.checkpoint, sampling, config.device)


def _judged(
    problems: Sequence[Problem], rows: Sequence[dict[str, Any]], config: Config, output: pathlib.Path
) -> list[judge.Grade]:
    """Has the first completions graded. Grades are appended to grades.jsonl as they come: what stands there of the same
    judge is not asked for again."""
    first = {row["task_id"]: row["completion"] for row in rows if row["sample"] == 0}
    assert config.judge_model is not None
    path = output / "grades.jsonl"
    whose = {"judge": config.judge_model, "url": config.judge_url}
    known: dict[str, tuple[int, str]] = {}
    for number, row in enumerate(_read_appended(path), 1):
        try:
            if {name: row[name] for name in whose} == whose:
                known[row["asked"]] = judge.checked(row["grade"]), str(row["critique"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: row {number} is no grade ({error}); delete it, or the file") from error
    ask = judge.server_ask(config.judge_url, config.judge_model)
    progress = Progress("evaluate: judged", 0, "answers")
    lock = threading.Lock()
    with open(path, "a", encoding="utf-8") as file:

        def keep(asked: str, value: int, critique: str) -> None:
            with lock:
                file.write(json.dumps(whose | {"asked": asked, "grade": value, "critique": critique}) + "\n")
                file.flush()

        grades = judge.grade(
            problems,
            [first[problem.task_id] for problem in problems],
            ask,
            repeats=config.judge_repeats,
            seed=config.seed,
            workers=config.workers,
            known=known,
            keep=keep,
            progress=progress.report,
        )
    progress.close()
    return grades


def sample(
    problems: Sequence[Problem],
    model: Model,
    output: pathlib.Path,
    identity: dict[str, Any],
    config: Config,
    strength: str,
) -> list[dict[str, Any]]:
    """Completes and runs what `output`/samples.jsonl does not hold yet, or holds without an answer; returns all rows.

    A row: task_id, sample, answer (the model's), completion (what of it was run: `answers.read`), how it was read,
    program, status ("no_answer" and "no_test" besides the sandbox's), detail, output, seconds, cpu_seconds,
    by_stop_strings (the status of the answer cut there instead), strength, model and tokenizer; in the order in which
    they were done. Raises UserError if the folder holds samples of another checkpoint, benchmark or sampling, and where
    the server fails for all prompts: an answer that it owes is no wrong answer.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "samples.jsonl"
    claim(output / "settings.json", identity, "samples")
    by_id = {problem.task_id: problem for problem in problems}
    wanted = [(task_id, i) for i in range(config.samples) for task_id in by_id]
    found = _read_samples(path, wanted)
    rows = [row for row in found if row["status"] != "no_answer"]
    done = {(row["task_id"], row["sample"]) for row in rows}
    again = {(row["task_id"], row["sample"]) for row in found} - done
    todo = sorted((one for one in wanted if one not in done), key=again.__contains__)
    progress = Progress("evaluate: completed and run", len(todo), "answers")
    for start in range(0, len(todo), CHUNK):
        chunk = todo[start : start + CHUNK]
        given = _complete(model, [by_id[task_id].prompt for task_id, _ in chunk], config.seed + len(rows))
        many = len(chunk) > FEW or all(row["status"] == "no_answer" for row in rows)
        if many and all(isinstance(one, Unserved) for one in given) and not again & {*chunk}:
            raise UserError(
                f"{model.name}: no answer to any of {len(chunk)} prompts ({given[0]}); nothing of them is kept: see "
                "to the server (--model-url, --answer-timeout), then run the same command again"
            )
        with open(path, "a", encoding="utf-8") as file:
            for place, row in _run([by_id[task_id] for task_id, _ in chunk], given, config):
                row = {"task_id": chunk[place][0], "sample": chunk[place][1]} | row
                row |= {"strength": strength, "model": model.hash, "tokenizer": model.tokenizer}
                file.write(json.dumps(row) + "\n")  # ASCII: whatever the model wrote, a line is a line
                file.flush()  # as they come: what ended this process would not end them
                rows.append(row)
            os.fsync(file.fileno())
        progress.advance(len(chunk))
    progress.close()
    return rows


def _complete(model: Model, prompts: Sequence[str], seed: int) -> list["str | Refused"]:
    """The model's answers; a prompt that is no text is refused for it."""
    texts = [place for place, prompt in enumerate(prompts) if prompt == _clear(prompt)]
    given: list[str | Refused] = [Refused("the prompt holds half a character, which no tokenizer reads")] * len(prompts)
    for place, answer in zip(
        texts, model.complete([prompts[place] for place in texts], seed) if texts else (), strict=True
    ):
        given[place] = answer
    return given


def _run(
    problems: Sequence[Problem], given: Sequence["str | Refused"], config: Config
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs answers both ways, by parsing and by stop strings; yields (place, row) as they are done."""
    jobs: list[sandbox.Job] = []
    ways: list[tuple[int, str]] = []  # of each job: whose it is, and how the answer was cut
    rows: dict[int, dict[str, Any]] = {}
    for place, (problem, answer) in enumerate(zip(problems, given, strict=True)):
        if isinstance(answer, Refused):
            blank = {
                "answer": "",
                "completion": "",
                "how": "",
                "program": problem.prompt,
                "output": "",
                "seconds": 0.0,
                "cpu_seconds": 0.0,
            }
            yield place, blank | {"status": "no_answer", "detail": str(answer), "by_stop_strings": "no_answer"}
            continue
        reading, stopped = answers.read(problem, answer), answers.cut(answer)
        row = {
            "answer": answer[: answers.LONGEST],
            "completion": reading.completion,
            "how": reading.how,
            "program": problem.prompt + reading.completion,
        }
        if not problem.test.strip():
            facts = {
                "status": "no_test",
                "detail": "the problem has no test",
                "output": "",
                "seconds": 0.0,
                "cpu_seconds": 0.0,
            }
            yield place, row | facts | {"by_stop_strings": "no_test"}
            continue
        rows[place] = row
        for way, completion in (("parsing", reading.completion), ("stop strings", stopped)):
            if way == "parsing" or completion != reading.completion:
                jobs.append(problem.job(completion, config.timeout))
                ways.append((place, way))
    results: dict[int, dict[str, sandbox.Result]] = {place: {} for place in rows}
    for number, result in sandbox.run_each(jobs, workers=config.workers):
        place, way = ways[number]
        results[place][way] = result
        if len(results[place]) == sum(owner == place for owner, _ in ways):
            ran = results[place]["parsing"]
            facts = {
                "status": ran.status,
                "detail": _clear(ran.detail),
                "output": _clear(ran.output[:OUTPUT]),
                "seconds": round(ran.seconds, 4),
                "cpu_seconds": round(ran.cpu, 4),
            }
            yield place, rows[place] | facts | {"by_stop_strings": results[place].get("stop strings", ran).status}


def _clear(text: str) -> str:
    """Text without halves of characters, which no file of UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A line ends at a newline only: a string may hold U+2028, raw."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); delete it, or the folder") from error
    return rows


def _read_appended(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file that is appended to, if it is there. A last line that was cut short is removed from it."""
    if not path.exists():
        return []
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with open(path, "r+b") as file:
            file.truncate(len(whole + newline))
    return read_lines(path)


_COLUMNS = {"task_id": str, "sample": int, "status": str, "by_stop_strings": str, "completion": str}
"""What the score and the judge read of a row."""


def _read_samples(path: pathlib.Path, wanted: Collection[tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows of an earlier run, of each sample the last. Rows that another replaces, and those without an answer, are
    removed from the file. Raises UserError for a row of something else."""
    lines = _read_appended(path)
    last: dict[tuple[str, int], dict[str, Any]] = {}
    expected = set(wanted)
    for number, row in enumerate(lines, 1):
        wrong = [
            name for name, kind in _COLUMNS.items() if not isinstance(row, dict) or type(row.get(name)) is not kind
        ]
        if wrong or (row["task_id"], row["sample"]) not in expected:
            why = f"no {', '.join(wrong)}" if wrong else f"{row['task_id']!r}, sample {row['sample']}"
            raise UserError(f"{path}: row {number} is none of this evaluation ({why}); delete it, or the folder")
        last[row["task_id"], row["sample"]] = row
    kept = [row for row in last.values() if row["status"] != "no_answer"]
    if len(kept) < len(lines):
        with atomic_write(path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
    return list(last.values())


def score(problems: Sequence[Problem], rows: Sequence[dict[str, Any]], ks: Sequence[int] = (1,)) -> dict[str, Any]:
    """pass@k with 95% intervals (Wilson's, and by bootstrap) over all problems and per group, by both ways to cut; the
    count of each status. Problems without a test are left out, and counted."""
    tested = [problem for problem in problems if problem.test.strip()]
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    groups = {"all": tested}
    for problem in tested:
        if problem.group:
            groups.setdefault(problem.group, []).append(problem)
    scores = []
    for cut, column in (("parsing", "status"), ("stop strings", "by_stop_strings")):
        outcomes: dict[str, list[bool]] = {problem.task_id: [] for problem in tested}
        for row in rows:
            if row["task_id"] in outcomes:
                outcomes[row["task_id"]].append(row[column] == "passed")
        samples = min(map(len, outcomes.values()), default=0)
        for group, members in groups.items():
            for k in ks:
                if k <= samples and (cut == "parsing" or group == "all"):
                    values = [pass_at_k(len(o := outcomes[p.task_id]), sum(o), k) for p in members]
                    low, high = interval(values)
                    scores.append(
                        {
                            "group": group,
                            "cut": cut,
                            "problems": len(members),
                            "k": k,
                            "pass": sum(values) / len(values),
                            "low": low,
                            "high": high,
                            "bootstrap": bootstrap(values),
                        }
                    )
    return {"scores": scores, "statuses": statuses, "without_test": len(problems) - len(tested)}


def table(results: dict[str, Any]) -> str:
    """The score as text."""
    lines = [
        f"{results['benchmark']}, {results['samples']} sample(s) a problem, temperature {results['temperature']:g}",
        f"{'':<12}{'problems':>9}{'pass@k':>10}{'':>9}  95% interval, by bootstrap",
    ]
    for row in results["scores"]:
        low, high = row["bootstrap"]
        note = "  (cut at stop strings)" if row["cut"] != "parsing" else ""
        lines.append(
            f"{row['group']:<12}{row['problems']:>9}{'pass@' + str(row['k']):>10}{100 * row['pass']:>8.1f}%"
            f"  {100 * row['low']:.1f}–{100 * row['high']:.1f}%, {100 * low:.1f}–{100 * high:.1f}%{note}"
        )
    lines.append("outcomes: " + ", ".join(f"{status} {count}" for status, count in sorted(results["statuses"].items())))
    if results["statuses"].get("no_answer"):
        lines.append("no_answer counts as not passed; the same command asks for those again")
    if count := results["without_test"]:
        lines.append(f"{count} problems have no test and are in no score")
    if "judge" in results:
        lines.append(f"judge {results['judge']['model']}: {judge.describe(results['judge'])}")
    return "\n".join(lines)
