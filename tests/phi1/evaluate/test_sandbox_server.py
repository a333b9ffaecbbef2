"""A server of the sandbox: what of the machine it is given."""

import pathlib

import pytest

from phi1.errors import UserError
from phi1.evaluate import sandbox, sandbox_server
from phi1.evaluate.inside import visible
from phi1.evaluate.sandbox import Job


@pytest.mark.parametrize("entry", [".", "..", "", "{folder}", "{folder}/..", "/", "{folder}/lib/.."])
def test_no_entry_of_the_library_path_opens_the_project(
    entry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Nor does it cost the sandbox its strength."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "secret").write_text("sk-secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{entry.format(folder=tmp_path)}:{tmp_path}/lib")
    best = sandbox.strength().level
    server = sandbox.Server()
    try:
        result = server.run(
            Job(f"import os\nprint(os.listdir({str(tmp_path / 'lib')!r}))\nopen({str(tmp_path / 'secret')!r})")
        )
        assert server.strength.level == best
    finally:
        server.close()
    assert result.output == "[]\n" and result.detail.startswith(("FileNotFoundError", "PermissionError"))


def test_entries_of_the_library_path() -> None:
    private = ("/home/ann", "/srv/data/project", "/opt/conda/lib/python3.12/site-packages/phi1")
    for entry, shown in {
        "/usr/local/cuda/lib64": True,
        "/home/ann/lib": True,
        "/home/ann": False,
        "/home": False,
        "/srv/data/other/..": False,
        "/opt/conda/lib": True,  # what is installed for its Python is hidden
        "lib": False,
        "/": False,
    }.items():
        assert visible.library_path(f"{entry}:/lib", private) == (f"{entry}:/lib" if shown else "/lib"), entry


def test_a_package_that_cannot_be_imported_is_the_error_of_its_own_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    installed = tmp_path / "some-packages"
    installed.mkdir()
    (installed / "broken.py").write_text("raise ImportError('no such library')")
    (installed / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\ntwo = 2"
    )
    (tmp_path / "beside.py").write_text("")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.syspath_prepend(str(tmp_path))
    jobs = [
        Job(
            "def f(x):\n    return x", f"import {name}\nassert f(2) == getattr({name}, 'two', 2)", "f", packages=(name,)
        )
        for name in ("json", "broken", "beside", "__main__", "threaded", "numpy")
    ]
    results = sandbox.run_many(jobs)
    assert [result.status for result in results] == ["passed", "error", "error", "error", "passed", "passed"], results
    assert "needs broken" in results[1].detail and "no such library" in results[1].detail
    assert "not installed: beside" in results[2].detail and "not installed: __main__" in results[3].detail
    server = sandbox.Server(("threaded",))
    server.close()
    assert server.strength == sandbox.strength()
    sandbox.close_idle()


def test_a_sandbox_that_does_not_start_is_no_package_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.close_idle()
    monkeypatch.setattr(sandbox_server, "_SERVER", pathlib.Path("/nowhere"))
    with pytest.raises(UserError, match="the sandbox does not start"):
        sandbox.run_program("pass", packages=("numpy",))


def test_waiting_in_small_sleeps_counts_and_talking_to_the_test_does_not() -> None:
    for pause in (0.01, 0.001):
        source = (
            f"import time\ndef f(x):\n    for _ in range(int(12 / {pause})):\n        time.sleep({pause})\n    return x"
        )
        result = sandbox.run_program(source, test="assert f(1) == 1", entry_point="f", timeout=1.0)
        assert result.status == "timed_out" and result.seconds < 6, result
    test = "assert all(f(i) == i for i in range(20_000))"
    talks = sandbox.run_program("def f(x):\n    return x", test=test, entry_point="f", timeout=20.0)
    again = sandbox.run_program("def f(x):\n    return x", test=test, entry_point="f", timeout=talks.cpu * 2.0)
    assert talks.status == again.status == "passed", (talks, again)
