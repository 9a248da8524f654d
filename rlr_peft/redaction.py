"""Secrets stay out of what is shown, written and published.

Addresses are taken apart by a URL parser: who logs in, every value of the query that is not known to be harmless, and
the fragment are crossed out, and of an address that cannot be parsed all that could be a password. Besides, what looks
like an access token, and what is given to a name such as `--hub_token` or `HF_TOKEN`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

HIDDEN = "***"

# Where an address begins; also `http:/host` and `http:host`, which are typing mistakes.
_START = re.compile(r"(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]*:(?:\\*/){2,}|https?:/?(?=[^\s/]))", re.IGNORECASE)
# `me:password@host` without a scheme.
_LOGIN = re.compile(
    r"(?:(?<=//)|(?<![\w.+%~/@-]))(?!mailto:|[a-z]:\\)[\w.+%~-]+:[^\s@/\"'<>{}();,]+@(?=[\w\[])", re.IGNORECASE
)
_CLOSING = {'"': '"', "'": "'", "`": "`", "<": ">", "(": ")", "[": "]"}
_WORD_END = re.compile(r"\s|</")
# Ports that no password is hidden behind: a redacted one, and that of our own `http://HOST:PORT/`.
_NO_PORTS = (f":{HIDDEN}", "HOST:PORT", "host:port")
# How far the rest of a password with a space in it is looked for, in characters.
_REACH = 100

# In a query these are shown; whatever else there is may be a key.
_HARMLESS = frozenset(
    "api-version api_version batch batch_size device dtype format height lang language library limit model n page "
    "revision seed size step steps task timeout version width".split()
)
_HARMLESS_VALUE = re.compile(r"[\w.,:/+-]{0,40}")
_PLAIN_NAME = re.compile(r"[\w.\[\]-]{1,40}")
# A name that ends in one of these words is that of a secret: `token`, `hub_token`, `X-Amz-Signature`, `accessKey`.
_SECRET_WORDS = frozenset(
    "apikey auth authorization bearer code cookie cred credential credentials creds jwt key otp pass passcode "
    "passphrase passwd password pat pw pwd secret session sessionid sid sig signature token".split()
)
_OBVIOUS_NAMES = frozenset("apikey passphrase passwd password pwd".split())
_PART_OF_NAME = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")

_TOKEN = re.compile(
    r"hf_(?:(?:oauth|jwt)_)?[A-Za-z0-9]{16}[\w.-]*|\bsk-[\w-]{16,}|\bgithub_pat_\w{16,}|\bgh[pousr]_\w{16,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
_VALUE = r"(?:\"(?:\\.|[^\"\\\n])+\"|'(?:\\.|[^'\\\n])+'|[^\s\"'`<>&,;)}\]]+)"
_HEADER = re.compile(rf"(\bAuthorization\W{{1,4}}(?:(?:Bearer|Basic|Token)\s+)?|\bBearer\s+(?=\S{{16}}))()({_VALUE})")
_FLAG = re.compile(rf"((?<![\w-])--([\w-]+)=)({_VALUE})")
_FLAG_AND_WORD = re.compile(rf"((?<![\w-])--([\w-]+)(?:[\"'],\s*|[ \t]+))(?!-|[a-z]+[.,;:]?(?:\s|$))({_VALUE})")
_ASSIGNMENT = re.compile(rf"((?<![\w.?&#;/-])[\"']?([A-Za-z]\w*)[\"']?(?:=|:\s+))({_VALUE})")
_PARAMETER = re.compile(r"([?&#;/]([\w.\[\]-]{1,40})=)([^\s&#;\"'`<>]+)")
_NOTHING = ("null", "None", "true", "false", "True", "False", HIDDEN)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without what is secret in it; the same for a text that went through already.

    Args:
        secrets: further ones that are known, such as a token in use; crossed out wherever they stand.
    """
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _in_text(_TOKEN.sub(HIDDEN, text))
    text = _LOGIN.sub(f"{HIDDEN}@", text)
    for pattern in (_PARAMETER, _FLAG, _FLAG_AND_WORD):
        text = pattern.sub(lambda found: _hidden_value(found, is_secret_name(found[2])), text)
    text = _ASSIGNMENT.sub(lambda found: _hidden_value(found, _is_assigned_secret(found[2])), text)
    return _HEADER.sub(lambda found: _hidden_value(found, True), text)


def redacted_address(text: str) -> str:
    """The same of a text that may be one address as a whole, to which spaces and quotes belong too."""
    start = _START.match(text)
    return redacted(start[0] + _in_address(text[start.end() :]) if start else text)


def is_address(text: str) -> bool:
    """Whether the text is meant as an address, right or not: `http://host`, `ftp://host`, `http:host`."""
    return _START.match(text) is not None or _LOGIN.match(text) is not None


def redacted_values(value: Any) -> Any:
    """A plain value, list or mapping, in which every text and every name is redacted."""
    if isinstance(value, str):
        return redacted_address(value)
    if isinstance(value, dict):
        return {redacted_values(name): redacted_values(part) for name, part in value.items()}
    return [redacted_values(part) for part in value] if isinstance(value, (list, tuple)) else value


def redacted_command(words: Sequence[str]) -> list[str]:
    """A command line without flags of secrets such as `--hub_token TOKEN`, the other words redacted."""
    kept: list[str] = []
    is_secret = False
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            is_secret = is_secret_name(flag)
            if not is_secret:
                kept.append(f"{flag}{equals}{redacted_address(value)}")
        elif not is_secret:
            kept.append(redacted_address(word))
    return kept


def secrets_of_command(words: Sequence[str]) -> list[str]:
    """What a command line gives to flags of secrets, also in more than one word."""
    found: list[str] = []
    is_secret = False
    for word in words:
        if word.startswith("--"):
            flag, _, word = word.partition("=")
            is_secret = is_secret_name(flag)
        if is_secret and word.strip():
            found.append(word)
    return found


def is_secret_name(name: str) -> bool:
    """Whether what a flag, a variable or a part of a query is called says that it holds a secret."""
    words = _PART_OF_NAME.findall(name)
    return bool(words) and words[-1].lower() in _SECRET_WORDS


def _is_assigned_secret(name: str) -> bool:
    """In prose, `code: 4` is none: only a name of several words, or in capitals, or one that is plain enough."""
    is_special = "_" in name or name.isupper() or not (name.islower() or name.istitle())
    return name.lower() in _OBVIOUS_NAMES or (is_special and is_secret_name(name))


def _hidden_value(found: re.Match[str], is_secret: bool) -> str:
    value = found[3]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found[1]}{quote}{HIDDEN}{quote}" if is_secret and value.strip("\"'") not in _NOTHING else found[0]


def _in_text(text: str) -> str:
    """The text with every address in it redacted."""
    parts, done = [], 0
    while start := _START.search(text, done):
        end = _end_of_address(text, start)
        parts += [text[done : start.end()], _in_address(text[start.end() : end])]
        done = max(end, start.end())
    return "".join([*parts, text[done:]])


def _end_of_address(text: str, start: re.Match[str]) -> int:
    """Where the address ends: at the quote or bracket that closes it, at a blank, or past the rest of a password."""
    blank = _WORD_END.search(text, start.end())
    end = blank.start() if blank else len(text)
    closing = _CLOSING.get(text[start.start() - 1 : start.start()])
    if closing is not None:
        place = text.find(closing, start.end(), end)
        while place >= 0:
            # A password may hold that quote: then what stands before it is no address yet, or the word goes on.
            goes_on = closing in "\"'" and re.match(r"[\w\"']", text[place + 1 : place + 2])
            if not goes_on and text[place - 1] != "\\" and _is_whole(text[start.end() : place]):
                return place
            place = text.find(closing, place + 1, end)
    if not _is_whole(text[start.end() : end]):
        line_end = text.find("\n", end)
        reach = min(end + _REACH, len(text) if line_end < 0 else line_end)
        at = text.find("@", end, reach)
        if at >= 0:
            blank = _WORD_END.search(text, at)
            return blank.start() if blank else len(text)
    return end


def _is_whole(rest: str) -> bool:
    """Whether this can be an address with a host, and a port that is a number or nothing."""
    try:
        parts = urlsplit(f"//{rest}")
        return parts.netloc.endswith(_NO_PORTS) or parts.port is None or not rest.endswith("@")
    except ValueError:
        return False


def _in_address(rest: str) -> str:
    """What follows the `//` of an address."""
    head = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if head in _NO_PORTS:
        return rest
    last = rest.rfind("@")
    if last >= 0 and ("@" in head or ":" in head):
        # A password with `/`, `?`, `#` or `@` in it goes on to the last `@`.
        return f"{HIDDEN}@{_in_address(rest[last + 1 :])}"
    try:
        parts = urlsplit(f"//{rest}")
        _ = parts.port
    except ValueError:
        host, colon, _ = head.partition(":")
        is_name = bool(colon) and re.fullmatch(r"[\w.-]+", host) is not None
        return f"{host}:{HIDDEN}" if is_name else HIDDEN
    query, fragment = _in_query(parts.query), parts.fragment and HIDDEN
    return f"{parts.netloc}{parts.path}{query and f'?{query}'}{fragment and f'#{fragment}'}"


def _in_query(query: str) -> str:
    return "".join(
        part if index % 2 else _in_parameter(part) for index, part in enumerate(re.split("(&amp;|[&;])", query))
    )


def _in_parameter(part: str) -> str:
    name, equals, value = part.partition("=")
    if not part or (name.lower() in _HARMLESS and _HARMLESS_VALUE.fullmatch(value)):
        return part
    return f"{name}={HIDDEN}" if equals and _PLAIN_NAME.fullmatch(name) else HIDDEN
