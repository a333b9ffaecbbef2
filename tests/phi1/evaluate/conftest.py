"""A server that speaks OpenAI's protocol, for tests of models and judges."""

from collections.abc import Iterator

import pytest
from served import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    one = Server()
    yield one
    one.close()
