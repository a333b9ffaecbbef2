"""Opening a run: claimed, on what it goes on, what is set aside, what is kept."""

import builtins
import collections
import errno
import os
import pathlib
import shutil
import threading

import pytest
import torch
from training import change, content, losses, records, trainer_of, write

from phi1 import checkpoint, files, run
from phi1.checkpoint import in_run
from phi1.errors import UserError
from phi1.run import Run
from phi1.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(folder):
    return [path.name for path in in_run(folder)]


@pytest.fixture
def folder(config):
    """A run of 6 steps with checkpoints after 2, 4 and 6."""
    train(change(config, steps=6, checkpoint_every=2))
    return config.train.run_folder


def unfinished(path):
    (path / "checkpoint.json").unlink()


def emptied(path):
    for file in path.iterdir():
        file.unlink()


def flipped(path):
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(content)


def another_step(path):
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text.replace('"step": 6', '"step": 5'))


@pytest.mark.parametrize("damage", [unfinished, emptied, flipped, another_step])
def test_a_damaged_newest_checkpoint_falls_back_aloud(config, folder, tmp_path, capsys, damage):
    """It is set aside, not deleted; the run goes on from the one before and writes the same bits anew."""
    shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    damage(folder / "step-000006")
    capsys.readouterr()
    config = change(config, steps=6, checkpoint_every=2)
    train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if "set aside" in line]
    assert len(said) == 1 and said[0].startswith(f"{folder}/step-000006") and "step-000006.damaged" in said[0]
    assert steps(folder) == ["step-000002", "step-000004", "step-000006"]
    assert (folder / "step-000006.damaged").is_dir()
    assert content(folder / "step-000006") == content(tmp_path / "whole" / "step-000006")
    assert losses(folder) == losses(tmp_path / "whole")
    assert checkpoint.resolve(folder / "last").name == "step-000006"
    damage(folder / "step-000006")  # again: under another name
    train(config)
    assert (folder / "step-000006.damaged-2").is_dir()


def test_two_damaged_ones(config, folder, capsys):
    flipped(folder / "step-000006")
    unfinished(folder / "step-000004")
    with trainer_of(change(config, steps=6)) as trainer:
        assert trainer.step == 2
    assert steps(folder) == ["step-000002"]
    assert os.readlink(folder / "last") == "step-000002"
    assert capsys.readouterr().out.count("set aside") == 2


def test_none_is_whole(config, folder):
    """Then nothing is moved, and the run does not start from the beginning by itself: at no later time either."""
    for path in in_run(folder):
        flipped(path)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"step-000006/optimizer.*none of the 3 checkpoints in .* is whole: restore"
        ):
            train(change(config, steps=6))
    assert steps(folder) == ["step-000002", "step-000004", "step-000006"]


def test_a_folder_that_gets_in_the_way_is_set_aside(config, folder, monkeypatch, capsys):
    real = Run.save

    def save(self, step, write):
        (self.folder / f"step-{step:06d}").mkdir()
        real(self, step, write)

    monkeypatch.setattr(Run, "save", save)
    assert train(change(config, steps=8, checkpoint_every=8)).name == "step-000008"
    assert "step-000008 is in the way" in capsys.readouterr().out
    assert not list((folder / "step-000008.damaged").iterdir())


def test_odd_names_in_a_run_folder(config, folder, tmp_path):
    """Left as they are, but for what an interrupted training leaves."""
    stray = [
        "step-6",
        "step-000006 (copy)",
        "step-000006.tmp-mine",
        "last.tmp",
        "note\n.txt",
        "step-000006.tmp-1 (copy)",
    ]
    for name in stray:
        (folder / name).mkdir()
    (folder / "step-000009").write_text("a file")
    leftovers = [
        "step-000007.tmp-12",
        "step-000002.tmp-delete",
        "last.tmp-7",
        "metrics.jsonl.tmp-8",
        "step-000009.tmp-1",
    ]
    for name in leftovers[:2]:
        shutil.copytree(folder / "step-000006", folder / name)
    (folder / leftovers[2]).symlink_to("step-000007")  # to nowhere
    for name in leftovers[3:]:
        (folder / name).write_text("{")
    (folder / "last").unlink()
    shutil.copytree(folder / "step-000006", folder / "last")  # a copy of a run may follow the link
    assert train(change(config, steps=8, checkpoint_every=8)).name == "step-000008"
    names = {path.name for path in folder.iterdir()}
    assert names >= {*stray, "step-000009", "last.damaged"} and not names & set(leftovers)
    assert os.readlink(folder / "last") == "step-000008"


def test_a_run_folder_has_one_training(config, monkeypatch):
    refused = []
    real = Trainer.update

    def update(self):
        with pytest.raises(UserError, match="run: another training is running there"):
            train(config)
        refused.append(self.step)
        return real(self)

    monkeypatch.setattr(Trainer, "update", update)
    train(change(config, steps=1))
    assert refused == [0]


def test_a_run_folder_that_cannot_be(config, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", pathlib.Path("/proc/file")):
        with pytest.raises(UserError, match=r"file.*: cannot be written \(.*\); choose another --run-folder"):
            train(change(config, run_folder=folder))
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run/metrics.jsonl: Is a directory; mend that and run the same command again"):
        train(change(config, run_folder=tmp_path / "run"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(config, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(
        UserError, match=r"run: cannot be locked against a second training \(.*\); choose a --run-folder"
    ):
        train(config)


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(1 << 60), lambda: bytearray(1 << 60)], ids=["torch", "python"]
)
def test_a_cpu_that_is_out_of_memory(config, monkeypatch, allocate):
    monkeypatch.setattr(Trainer, "update", lambda self: allocate())
    with pytest.raises(UserError, match=r"cpu is out of memory at --micro-batch 4: lower it \(the step stays 8 sequ"):
        train(config)


def test_a_checkpoint_is_no_run_folder(config, folder, tmp_path, tokenizer):
    """A run in it would start from random weights, and be deleted with it."""
    before = content(folder / "step-000006")
    for path in (folder / "last", folder / "step-000006"):
        with pytest.raises(
            UserError, match=rf"{path}: is a checkpoint, no run folder; .* or another, with this as --init"
        ):
            train(change(config, run_folder=path))
    assert {path.name for path in (folder / "last").iterdir()} == {
        *before,
        "checkpoint.json",
        "config.json",
        "tokenizer.json",
    }
    model, _ = checkpoint.load_model(folder)
    checkpoint.write_model(tmp_path / "other" / "step-000000", model, tokenizer, {"imported_from": "there"})
    with pytest.raises(UserError, match=r"step-000000: written by no training .*; use it as --init-from, with another"):
        train(change(config, run_folder=tmp_path / "other"))


def test_a_full_disk_is_noticed_before_training(config, monkeypatch, capsys):
    """Room for one checkpoint more than is kept."""
    size = 3 * 4 * 37_824
    Usage = collections.namedtuple("Usage", "total used free")
    free = [3 * size]
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    config = change(config, keep_last=2, keep_every=4, steps=8, checkpoint_every=2)
    train(change(config, steps=4))
    assert "room for 2 more is needed" in capsys.readouterr().out  # there are only two to come
    free[0] = size - 1
    with pytest.raises(
        UserError,
        match=r"0\.5 MB, and room for 1 more is needed \(--keep-last 2, and one while it is "
        r"written\), but 0\.5 MB are free; free space there, lower --keep-last",
    ):
        train(config)
    free[0] = size
    train(config)
    assert "; --keep-every 4 keeps 1 more in time;" in capsys.readouterr().out
    with pytest.raises(UserError, match="room for 3 more"):
        train(change(config, run_folder=config.train.run_folder.with_name("other")))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [7]), (2, 0, [6, 7]), (1, 3, [3, 6, 7]), (3, 2, [2, 4, 5, 6, 7]), (9, 0, [1, 2, 3, 4, 5, 6, 7])],
)
def test_what_is_kept(tmp_path, keep_last, keep_every, kept):
    for step in range(1, 8):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        run.publish(folder, keep_last=keep_last, keep_every=keep_every)
        assert os.readlink(tmp_path / "last") == folder.name  # relative: the run folder may move
    assert steps(tmp_path) == [f"step-{step:06d}" for step in kept]


def test_an_old_checkpoint_that_cannot_be_deleted_is_said(config, folder, tmp_path, monkeypatch, capsys):
    """A link to one is deleted alone; neither ends a run, nor keeps it from starting again."""
    (folder / "step-000002").rename(tmp_path / "elsewhere")
    (folder / "step-000002").symlink_to(tmp_path / "elsewhere")
    (folder / "step-000001.tmp-7").symlink_to(tmp_path / "elsewhere")
    busy, real = folder / "step-000004.tmp-delete", shutil.rmtree

    def rmtree(path, **options):
        if path == busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for number in (7, 8):
        assert train(change(config, steps=number, keep_last=1)).name == f"step-{number:06d}"
        said = capsys.readouterr().out
        assert said.count(f"{busy}: cannot be deleted (Device or resource busy); it stays: delete it by hand") == 1
    assert steps(folder) == ["step-000008"]
    checkpoint.verify(tmp_path / "elsewhere")
    monkeypatch.undo()
    train(change(config, steps=8, keep_last=1))
    assert not list(folder.glob("*.tmp*"))


def test_run_folder_and_last_name_the_newest(folder):
    assert checkpoint.resolve(folder) == folder / "step-000006"
    shutil.copytree(folder / "step-000006", folder / "step-000010")
    assert checkpoint.resolve(folder) == folder / "step-000010"
    assert checkpoint.resolve(folder / "last") == folder / "step-000006"  # not published yet


def die_before(call):
    """Ends this process before the call of that number that would change a file, with status 9."""
    left, lock = [call], threading.Lock()  # the loop's calls and those of the thread that writes checkpoints

    def dying(real, changes):
        def called(*arguments, **options):
            if changes(*arguments):
                with lock:
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
            return real(*arguments, **options)

        return called

    for name in ("mkdir", "rename", "replace", "fsync", "symlink", "unlink", "rmdir", "chmod"):
        setattr(os, name, dying(getattr(os, name), lambda *_: True))
    builtins.open = dying(open, lambda path, mode="r", *_: set(mode) & set("wa"))


def test_killed_at_every_call_that_changes_a_file(config, folder, tmp_path):
    """A process that dies before any such call of a save leaves a folder from which the same bits come."""
    config = change(config, steps=8, checkpoint_every=2, keep_last=2)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole, symlinks=True)
    train(change(config, run_folder=whole))
    expected = content(whole / "step-000008")
    calls = deaths = 0
    while deaths == calls:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder, symlinks=True)
        shutil.rmtree(folder / "step-000008")
        child = os.fork()
        if child == 0:
            die_before(calls)
            try:
                train(config)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        deaths += os.waitstatus_to_exitcode(status) == 9
        calls += 1
        train(config)
        assert content(folder / "step-000008") == expected
        assert steps(folder) == ["step-000006", "step-000008"]
        assert not list(folder.glob("*.tmp*"))
        assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, 9))
    assert deaths > 30


def test_other_data_is_refused(config, folder, tmp_path, tokenizer, texts):
    other = write(tmp_path / "other", tokenizer, texts[1:])
    with pytest.raises(UserError, match=r"run: holds a run made otherwise \(other token shards\)"):
        train(change(config, tokens=other))
