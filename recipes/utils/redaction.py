"""Secrets in texts: tokens, passwords in addresses, and signed links never reach a log, a card or an error.

Nor does the content of a picture. The one place that knows what these look like. Importing it is cheap.
"""

import logging
import os
import re


# Tokens by their shape: Hugging Face, GitHub, GitLab, OpenAI, Amazon, and JSON web tokens.
# `hf_processor_mm_kwargs` and the like are names in programs.
_TOKEN = (
    r"\bhf_(?:[a-z]+_)?(?=[A-Za-z0-9]{16})[\w-]+|\b(?:gh[opsu]_|github_pat_|glpat-|sk-|AKIA|ASIA)[\w-]{16,}"
    r"|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+"
)
# `user:password@` of an address; the second also has a slash in the password, and is no port.
_PASSWORD = r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+@"
_SLOPPY = r"(?<=://)[^\s/@:'\"]*:(?!\d+/)[^\s@'\"]+@"
# Headers and parameters that grant access, whatever their value looks like.
_GRANT = (
    r"(?i:\bbearer\s+[^\s'\"]{6,}|(?<![\w-])(?:x-amz-(?:signature|security-token|credential)|signature|sig|"
    r"(?:hub_|access_|auth_|api_)?token|api[_-]?key|password|secret)=[^\s&,;'\")]+)"
)
_CERTAIN = re.compile(rf"{_TOKEN}|{_PASSWORD}")
_LIKELY = re.compile(rf"{_TOKEN}|{_SLOPPY}|{_GRANT}")
_USER = re.compile(r"(?<=://)[^\s/@'\"]+@")  # a token is often in the place of the user
# All that stands behind the path of an address: what is signed can have any name there.
_QUERY = re.compile(
    r"(?<![\w.+-])((?:https?|ftp|s3|gs|az|abfss?)://[^\s?#'\"<>]*)[?#](?!…)[^\s'\"<>]*?(?=[).,;:\]]*(?:[\s'\"<>]|$))"
)
# Data URIs, base64 and bytes that are so long that they hold a picture, or a part of one.
_PICTURE = re.compile(
    r"data:[\w/+.;=-]{0,100},[\w+/=%-]{40,}|(?<![\w+/=-])[\w+/=-]{240,}|\bb(?:'(?:\\.|[^\\']){60,}'?|\"(?:\\.|[^\\\"]){60,}\"?)"
)
_NAMES = re.compile(r"(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")


_TOLD: set[str] = set()  # secrets that look like nothing


def remember_secret(value: str) -> None:
    """Leave a value out of all texts from now on, such as a key whose variable has a name of its own."""
    if len(value) >= 8:  # shorter ones are words that people put where a key is asked for
        _TOLD.add(value)


def _of_this_process() -> list[str]:
    """Secrets of the environment, such as the value of HF_TOKEN, and those that were told."""
    named = [value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= 12]
    return [*named, *_TOLD]


def hide_known_secrets(text: str) -> str:
    """A text as it is, but for secrets whose very value is known: for what has to be kept to the letter."""
    for value in _of_this_process():
        text = text.replace(value, "…")
    return text


def redact(text: str) -> str:
    """
    A text without secrets and pictures: `…` in the place of tokens, passwords, pictures, and of all that follows an
    address's path.

    Args:
        text: any text, such as an error's or the address of a dataset.
    """
    text = _QUERY.sub(r"\1?…", _PICTURE.sub("…", hide_known_secrets(text)))
    return _USER.sub("", _LIKELY.sub(_shortened, text))


def _shortened(match: re.Match[str]) -> str:
    found = match[0]
    if found.endswith("@"):  # the user's name is nobody's business either
        return ""
    head = re.match(r"(?i)bearer\s+|[\w-]+=|hf_", found)
    return f"{head[0] if head else ''}…"


def holds_secret(text: str) -> bool:
    """Whether a text that is to be published holds a token or a password beyond doubt."""
    return bool(_CERTAIN.search(text)) or any(value in text for value in _of_this_process())


def redact_logs() -> None:
    """Let no record of Python's logging carry a secret from now on, whichever library writes it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def redacted(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # a wrong format, which logging reports itself
            return record
        if (cleaned := redact(text)) != text:
            record.msg, record.args = cleaned, ()
        return record

    redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacted)
