"""What a thread does meanwhile, and how one learns that it failed."""

import threading

import pytest

from phi1.background import Background
from phi1.errors import UserError


def test_the_caller_goes_on_and_waits_when_it_wants():
    writer, release, done = Background(), threading.Event(), []
    writer.wait()  # nothing to wait for
    writer.start(lambda: release.wait(60) and done.append(1))
    writer.check()
    assert not done
    release.set()
    writer.start(lambda: done.append(2))  # after the one before
    writer.wait()
    assert done == [1, 2]


def test_a_failure_is_raised_once():
    def fail():
        raise UserError("no space")

    writer = Background()
    assert not writer.failed
    for look in (writer.wait, lambda: writer.start(print), lambda: (writer._thread.join(), writer.check())):
        writer.start(fail)
        with pytest.raises(UserError, match="no space"):
            look()
        assert writer.failed
        writer.check()
        writer.wait()
    writer.fail(UserError("no space"))
    with pytest.raises(UserError, match="no space"):
        writer.check()
    writer.start(print)
    assert not writer.failed
