"""Requests, clients and refusals of the tests of data_tools/llm.py."""

import pathlib
from typing import Any

from fake_openai import FakeServer

from data_tools.chat import Request
from data_tools.llm import LLM, LLMConfig


def request(text: str = "hello", **options: Any) -> Request:
    return Request([{"role": "user", "content": text}], **({"max_tokens": 5} | options))


def client(server: FakeServer | str, tmp_path: pathlib.Path, **options: Any) -> LLM:
    base_url = server if isinstance(server, str) else server.base_url
    return LLM(LLMConfig(base_url=base_url, model="fake-1", **options), tmp_path / "llm.sqlite")


def error(status: int, message: str, headers: dict[str, str] | None = None, code: str = "") -> Any:
    return status, headers or {}, {"error": {"message": message, "code": code}}
