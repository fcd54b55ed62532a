"""What an endpoint's answer says: the text of a reply, or in a few words why there is none."""

import codecs
import json
import math
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from critrm.endpoints import Access
from critrm.types import TokenChoice

if TYPE_CHECKING:
    import openai


def fatal_reason(error: "openai.APIStatusError", *, model: str, access: Access) -> str:
    """Why no call at all can succeed, or empty."""
    status = error.status_code
    # A router answers 403 for one text that its moderation flagged; that says nothing about the key.
    if status in (401, 403) and "flagged" not in str(error.body):
        return f"{access.names()} rejects the API key (http {status}): set {access.variable} to a valid one"
    if status == 404:
        hint = "check --model, and --base-url, which usually ends in /v1"
        return f"{access.names()} does not know the model {model!r} (http 404): {hint}"
    if status == 402 or error.code == "insufficient_quota":
        return f"{access.names()} says that the account has no credit left (http {status})"
    return ""


def read_body(text: str, words: Callable[[str], str]) -> dict[str, Any]:
    """The facts of a Reply in the body of an HTTP 200.

    Args:
        text: the body.
        words: makes a server's words fit for a message.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return {"failure": "HTML instead of JSON" if text.lstrip().startswith("<") else "invalid JSON"}
    return read_completion(body, words)


def read_completion(body: Any, words: Callable[[str], str]) -> dict[str, Any]:
    """The facts of a Reply in a chat completion, whatever it holds."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        detail = error_message(body)
        return {"failure": words("no choices" + (f": {detail}" if detail else ""))}
    finish_reason = str(choice.get("finish_reason") or "")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    facts: dict[str, Any] = {
        "finish_reason": finish_reason,
        "n_prompt_tokens": _count(usage.get("prompt_tokens")),
        "n_completion_tokens": _count(usage.get("completion_tokens")),
    }
    if finish_reason == "content_filter":
        return facts | {"failure": "content_filter"}
    if isinstance(refusal, str) and refusal.strip():
        return facts | {"failure": words(f"refusal: {refusal}")}
    if not isinstance(content, str) or not content.strip():
        used_up = finish_reason == "length"
        return facts | {"failure": "empty reply" + (": max_tokens ran out before any text" if used_up else "")}
    if choices := _choices(choice.get("logprobs")):
        facts["choices"] = choices
    # JSON can spell half a character (a lone surrogate), which no file can hold.
    return facts | {"text": content.encode("utf-8", "replace").decode("utf-8")}


def _choices(logprobs: Any) -> tuple[TokenChoice, ...]:
    """The tokens of a reply with their alternatives; none where the answer does not hold them in due form."""
    try:
        tokens = logprobs["content"]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return tuple(
            TokenChoice(
                # A character can be in the bytes of several tokens.
                decoder.decode(bytes(list(each["bytes"]))) if each.get("bytes") else str(each["token"]),
                tuple((str(other["token"]), _logprob(other["logprob"])) for other in each["top_logprobs"]),
            )
            for each in tokens
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return ()


def _logprob(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value < 1e-3:
        raise ValueError("no logarithm of a probability")
    return min(0.0, float(value))  # rounding may leave a certainty a little above 0


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def error_message(body: object) -> str:
    """The server's own words in an error body: `{"error": {"message": ...}}` and its variants."""
    if isinstance(body, dict):
        return error_message(next((body[name] for name in ("error", "message", "detail") if name in body), ""))
    text = body if isinstance(body, str) else ""
    return "" if text.lstrip().startswith("<") else text


def retry_after(error: "openai.APIStatusError") -> float:
    """Seconds until the server wants to be asked again: 0 where it does not say."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0


def connection_reason(error: BaseException) -> tuple[str, bool]:
    """Why a call got no answer, in a few words, and whether the endpoint was there at all."""
    import httpx2  # openai's own HTTP library
    import openai

    connected = not isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return "timeout", connected
    cause: BaseException | None = error
    words = ""
    while cause is not None:
        # Both addresses of `localhost` are tried, and their errors come in a group.
        inner = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)
        if any(isinstance(item, ConnectionRefusedError) for item in inner):
            return "connection refused", False
        words = str(cause) or words
        cause = cause.__cause__ or cause.__context__
    return f"connection failed: {words}", connected
