"""The table of refusals, on the bodies that providers and servers really send."""

import datetime
import email.utils
import json

import pytest

from data_tools.provider_errors import Remedy, describe, duration, sort, wait_told


def openai(message: str, type: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "type": type, "param": param, "code": code}})


def vllm(message: str, type: str = "BadRequestError", code: int = 400) -> str:
    return json.dumps({"object": "error", "message": message, "type": type, "param": None, "code": code})


def llama(message: str, type: str, code: int, **more: int) -> str:
    return json.dumps({"error": {"code": code, "message": message, "type": type} | more})


RATE = (
    "Rate limit reached for gpt-4o-mini in organization org-abc on tokens per min (TPM): Limit 200000, Used 199500, "
    "Requested 1500. Please try again in {}. Visit https://platform.openai.com/account/rate-limits to learn more."
)
QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, "
    "read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
)
GEMINI = json.dumps(
    [
        {
            "error": {
                "code": 429,
                "message": "You exceeded your current quota, please check your plan and billing details.",
                "status": "RESOURCE_EXHAUSTED",
                "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36s"}],
            }
        }
    ]
)


@pytest.mark.parametrize(
    ("status", "body", "remedy", "after"),
    [
        # OpenAI
        (429, openai(QUOTA, "insufficient_quota", "insufficient_quota"), Remedy.STOP, None),
        (400, openai("Billing hard limit has been reached", code="billing_hard_limit_reached"), Remedy.STOP, None),
        (
            429,
            openai(
                "Your account is not active, please check your billing details on our website.",
                "billing_not_active",
                "billing_not_active",
            ),
            Remedy.STOP,
            None,
        ),
        (429, openai(RATE.format("1m10s"), "tokens", "rate_limit_exceeded"), Remedy.WAIT, 70.0),
        (429, openai(RATE.format("300ms"), "tokens", "rate_limit_exceeded"), Remedy.WAIT, 0.3),
        (429, openai(RATE.format("8.64s"), "requests", "rate_limit_exceeded"), Remedy.WAIT, 8.64),
        (429, openai(RATE.format("6h0m0s"), "requests", "rate_limit_exceeded"), Remedy.WAIT, 21600.0),
        (
            429,
            openai(
                "Request too large for gpt-4o in organization org-abc on tokens per min (TPM): Limit 30000, "
                "Requested 60000. The input or output tokens must be reduced in order to run successfully.",
                "tokens",
                "rate_limit_exceeded",
            ),
            Remedy.REQUEST,
            None,
        ),
        (
            400,
            openai(
                "This model's maximum context length is 16385 tokens. However, your messages resulted in 20013 "
                "tokens. Please reduce the length of the messages.",
                code="context_length_exceeded",
                param="messages",
            ),
            Remedy.REQUEST,
            None,
        ),
        (
            400,
            openai(
                "Invalid prompt: your prompt was flagged as potentially violating our usage policy. Please try "
                "again with a different prompt.",
                code="invalid_prompt",
            ),
            Remedy.REQUEST,
            None,
        ),
        (
            401,
            openai(
                "Incorrect API key provided: sk-abc***xyz. You can find your API key at "
                "https://platform.openai.com/account/api-keys.",
                code="invalid_api_key",
            ),
            Remedy.DOUBT,
            None,
        ),
        (
            403,
            openai(
                "Country, region, or territory not supported",
                "request_forbidden",
                "unsupported_country_region_territory",
            ),
            Remedy.DOUBT,
            None,
        ),
        (
            404,
            openai("The model `gpt-9` does not exist or you do not have access to it.", code="model_not_found"),
            Remedy.DOUBT,
            None,
        ),
        (
            400,
            openai(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                code="unsupported_parameter",
                param="max_tokens",
            ),
            Remedy.RENAME,
            None,
        ),
        (
            400,
            openai(
                "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value "
                "is supported.",
                code="unsupported_value",
                param="temperature",
            ),
            Remedy.DOUBT,
            None,
        ),
        (
            500,
            openai("The server had an error while processing your request. Sorry about that!", "server_error"),
            Remedy.RETRY,
            None,
        ),
        (503, openai("That model is currently overloaded with other requests.", "server_error"), Remedy.RETRY, None),
        # Azure, Anthropic, Gemini, DeepSeek, OpenRouter, Together
        (
            400,
            openai(
                "The response was filtered due to the prompt triggering Azure OpenAI's content management policy. "
                "Please modify your prompt and retry.",
                "",
                "content_filter",
                "prompt",
            ),
            Remedy.REQUEST,
            None,
        ),
        (
            429,
            json.dumps(
                {
                    "error": {
                        "code": "429",
                        "message": "Requests have exceeded token rate limit of your current "
                        "pricing tier. Please retry after 70 seconds.",
                    }
                }
            ),
            Remedy.WAIT,
            70.0,
        ),
        (
            400,
            json.dumps(
                {
                    "type": "error",
                    "error": {
                        "type": "invalid_request_error",
                        "message": "Your credit balance is "
                        "too low to access the Anthropic API. Please go to Plans & Billing to upgrade or purchase "
                        "credits.",
                    },
                }
            ),
            Remedy.STOP,
            None,
        ),
        (
            529,
            json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
            Remedy.RETRY,
            None,
        ),
        (429, GEMINI, Remedy.WAIT, 36.0),
        (402, openai("Insufficient Balance", "unknown_error", "invalid_request_error"), Remedy.STOP, None),
        (
            402,
            json.dumps(
                {
                    "error": {
                        "message": "Insufficient credits. Add more using https://openrouter.ai/settings/credits",
                        "code": 402,
                    }
                }
            ),
            Remedy.STOP,
            None,
        ),
        (402, "", Remedy.STOP, None),
        (
            403,
            json.dumps(
                {
                    "error": {
                        "code": 403,
                        "message": "openai/gpt-4o requires moderation. Your input was flagged",
                        "metadata": {"reasons": ["violence"]},
                    }
                }
            ),
            Remedy.REQUEST,
            None,
        ),
        # vLLM
        (
            400,
            vllm(
                "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4900 in the "
                "messages, 100 in the completion). Please reduce the length of the messages or completion."
            ),
            Remedy.REQUEST,
            None,
        ),
        (404, vllm("The model `gpt-4` does not exist.", "NotFoundError", 404), Remedy.DOUBT, None),
        (401, '{"error":"Unauthorized"}', Remedy.DOUBT, None),
        (
            400,
            vllm("[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted'}]"),
            Remedy.DOUBT,
            None,
        ),
        # llama.cpp
        (503, llama("Loading model", "unavailable_error", 503), Remedy.RETRY, None),
        (
            400,
            llama(
                "request (9001 tokens) exceeds the available context size (8192 tokens), try increasing it",
                "exceed_context_size_error",
                400,
                n_prompt_tokens=9001,
                n_ctx=8192,
            ),
            Remedy.REQUEST,
            None,
        ),
        (401, llama("Invalid API Key", "authentication_error", 401), Remedy.DOUBT, None),
        # Gateways
        (502, "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>", Remedy.RETRY, None),
        (413, "<html>Request Entity Too Large</html>", Remedy.REQUEST, None),
        (418, "I am a teapot", Remedy.DOUBT, None),
        (599, "", Remedy.RETRY, None),
    ],
)
def test_real_bodies(status: int, body: str, remedy: Remedy, after: float | None) -> None:
    verdict = sort(status, {}, body)
    assert (verdict.remedy, verdict.after) == (remedy, pytest.approx(after) if after else None)
    assert "\n" not in verdict.reason and verdict.reason.startswith(f"HTTP {status}: ")
    if remedy is Remedy.STOP:
        assert "top it up" in verdict.advice


def test_a_gateway_that_gave_up_may_be_billed_and_a_refusal_is_not() -> None:
    assert sort(504, {}, "").billed and not sort(500, {}, "").billed and not sort(429, {}, "").billed


def test_the_wait_is_read_from_headers_and_text() -> None:
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=30)
    assert wait_told({"retry-after": "2.5"}) == 2.5
    assert 25 < (wait_told({"retry-after": email.utils.format_datetime(soon)}) or 0) <= 30
    assert wait_told({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert wait_told({"retry-after": "soon"}) is None and wait_told({}) is None
    left = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}
    assert wait_told(left | {"x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": "9h"}) == 360.0
    assert wait_told({}, "Please wait 2 minutes before you retry.") == 120.0
    assert [duration(text) for text in ("1m10s", "6h0m0s", "300ms", "70 seconds", "1.5 h", "soon")] == [
        70.0,
        21600.0,
        0.3,
        70.0,
        5400.0,
        None,
    ]


@pytest.mark.parametrize(
    "body", ["", "null", "[]", "[1]", '{"error": null}', '{"error": {"message": {"a": 1}}}', "[" * 99999]
)
def test_a_body_of_any_form_has_a_message(body: str) -> None:
    assert describe(body)[0]
