"""What is a secret, by its value and by the name it stands under: the one place that decides.

Configs refuse them (section.py), as do command lines (arguments.py), because both are saved and shown: in config.yaml,
MLflow's parameters, the model card, ``ps`` and Ray's list of jobs. Secrets come from the environment, which nothing of
ours writes down; what others say may still repeat it, so every error's message passes through ``redacted``.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_SHORTEST_IN_ENVIRONMENT = 6  # characters: a shorter value ("minio") stands for other things too

# Each alternative is matched against a name as _NAME_IN_WORDS_: DB_PASSWD and dbPasswd are _DB_PASSWD_.
_SECRET_NAME = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|PWD_|_PASS_$|_PW_$|_CREDS_$|SECRET|TOKEN_$|CREDENTIAL|_PAT_$|_SAS_|API_?KEY|"
    r"(ACCESS|PRIVATE|STORAGE|ACCOUNT|SHARED|SIGNING|ENCRYPTION)_?KEY|CONN(ECTION)?_?STR(ING)?_$|_AUTH_$|"
    r"AUTHORIZATION|COOKIE_|_JWT_|_SIG_$|SIGNATURE_$"
)
# Where one lies, or what transformers call tokens.
_NO_SECRET_NAME = re.compile(
    r"_(FILE|PATH|DIR|URI|APPLICATION_CREDENTIALS|LENGTH)_$|_DISABLE_|_(CLASS|CLS|MASK|DIST|REG|PAD)_TOKEN_$"
)

_SECRET_VALUES = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:[^-]*-----END [A-Z ]*-----|.*)",
    "an AWS access key": r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?",
    "a GitHub token": r"\bgh[opsur]_[0-9A-Za-z]{20,}|\bgithub_pat_\w{20,}",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Hugging Face token": r"\bhf_[0-9A-Za-z]{20,}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}|hooks\.slack\.com/services/[\w/]+",
    "a webhook": r"\bdiscord(?:app)?\.com/api/webhooks/[\w/-]+",
    "a password before a host": r"(?<![\w/.@:+-])[^\s/@:'\"=]{1,100}:[^\s/@:'\"]{1,100}@[\w.-]{1,100}:\d{1,5}(?![\w.])",
    "a Google key": r"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}",
    "an API key": r"\bsk-[0-9A-Za-z]{32,}|\bsk-(?:ant|proj|svcacct)-[\w-]{20,}|\b[rs]k_live_[0-9A-Za-z]{16,}|"
    r"\b(?:gsk|glsa|dop_v1|wandb_v1)_\w{20,}|\bdapi[0-9a-f]{32}\b|\bnpm_[0-9A-Za-z]{36}\b|\bpypi-AgE[\w-]{16,}",
    "a bearer token": r"(?i:\bauthorization:\s*\w+\s+|\bbearer\s+(?=\S*\d))[\w.~+/=-]{6,}",
}
_KINDS = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _SECRET_VALUES.items()}

# scheme://user:password@host. A password with a raw / or # ends what URLs call the host; a port does not begin one.
_USER_INFO = re.compile(
    r"(?<![\w+.-])(?P<scheme>[A-Za-z][\w+.-]{0,40})://"
    r"(?P<user_info>[^\s/?#'\"]{1,500}|(?!arn:)[^\s/?#'\"@:\[]{0,100}:(?!:|\d+[/?#])[^\s'\"]{1,500})@"
)
# name=value of command lines, URLs and connection strings, and name: value of YAML, JSON and Python, but not of prose.
# The value is looked at ahead, because it may be a pair itself: tracking.uri=token=abc.
_NAME = r"(?P<name>[A-Za-z][\w.-]{0,100})[\"']?"  # bounded, as all here: the time is linear in the text's length
_QUOTED = r"\"[^\"]*\"|'[^']*'"
_PAIRS = (
    re.compile(rf"(?<![\w./]){_NAME}\s*=\s*(?=(?P<value>{_QUOTED}|[^\s,;&'\"}}\])]+))"),
    re.compile(rf"(?:^[\s-]{{0,200}}|[{{,]\s*)[\"']?{_NAME}\s*:\s*(?=(?P<value>{_QUOTED}|[^\n,}}\]]+))", re.MULTILINE),
)
_NO_SECRET = re.compile(r"['\"]?(?:true|false|none|null|\*{3}|\.{3})?['\"]?", re.IGNORECASE)
_PLACES = {
    "env.": "Ray shows cluster.env to everyone who can list jobs; set it in the environment of the cluster's nodes "
    "instead (Kubernetes: secretKeyRef)",
    "tracking": "configs and command lines are saved and shown; leave it out and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment",
    "": "configs and command lines are saved and shown; leave it out and give credentials by the environment, e.g. "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3",
}


@functools.lru_cache(maxsize=4096)  # a sweep reads the same keys some thousand times
def is_secret_name(name: str) -> bool:
    """Whether what stands under ``name``, e.g. DB_PASSWD or azureStorageKey, is by that name a secret."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(".")[2]))
    spelled = f"_{words.upper()}_"
    if name in ("PWD", "OLDPWD"):  # the shell's working directories
        return False
    # Of an environment; a sweep's with_key and a model's token_dim are none.
    in_capitals = name.isupper() and re.search(r"_KEY_$|_TOKEN_", spelled)
    return bool(in_capitals or _SECRET_NAME.search(spelled)) and not _NO_SECRET_NAME.search(spelled)


def secret_in(text: str) -> str | None:
    """What kind of secret ``text`` holds, e.g. "a password in a URL"; None if none is recognised."""
    for kind, pattern in _KINDS.items():
        if pattern.search(text):
            return kind
    if any(_is_secret_user_info(match) for match in _USER_INFO.finditer(text)):
        return "a password or token in a URL"
    pair = next((match for pattern in _PAIRS for match in pattern.finditer(text) if _is_secret_pair(match)), None)
    return pair and f"a value of {pair['name']}"


def objection(key: str, value: Any) -> str | None:
    """Why ``value`` must not stand under the dotted ``key`` or option: what it holds, and where that belongs; never
    the value. None if it may."""
    if isinstance(value, str) and (kind := secret_in(value)):
        found = f"{key} holds a secret ({kind})"
    elif _is_named_secret(key, value):
        found = f"{key} is a secret by its name"
    else:
        return None
    return f"{found}: {next(why for place, why in _PLACES.items() if place in key)}"


def objections(values: Any, prefix: str = "") -> Iterator[str]:
    """Those to all that nested mappings and lists hold, by dotted key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from objections(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            yield from objections(value, f"{prefix}.{i}")
    elif (why := objection(prefix, values)) is not None:
        yield why


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for every secret that is recognised."""
    for pattern in _KINDS.values():
        text = pattern.sub(HIDDEN, text)
    text = _USER_INFO.sub(lambda m: f"{m['scheme']}://{HIDDEN}@" if _is_secret_user_info(m) else m[0], text)
    for pattern in _PAIRS:
        text = _without_pairs(pattern, text)
    return text


def without_secret_values(flat: Mapping[str, str]) -> dict[str, str]:
    """Dotted key -> value, each ``without_secrets``, and hidden whole under the name of a secret."""
    return {key: HIDDEN if _is_named_secret(key, value) else without_secrets(value) for key, value in flat.items()}


def redacted(text: str) -> str:
    """``text`` without secrets, nor anything that is one in this process's environment: for messages to a person."""
    for secret in _environment_secrets():
        text = re.sub(rf"(?<![0-9A-Za-z]){re.escape(secret)}(?![0-9A-Za-z])", lambda _: HIDDEN, text)
    return without_secrets(text)


def _is_named_secret(key: str, value: Any) -> bool:
    """A number can be a password; a switch, as ``class_token: true`` of timm's, is none."""
    return any(map(is_secret_name, key.split("."))) and not _NO_SECRET.fullmatch(str(value))


def _is_secret_user_info(match: re.Match[str]) -> bool:
    """A name alone is a token to web servers, and a user's to sftp:// or a container to abfss://."""
    _, colon, password = match["user_info"].partition(":")
    return match["user_info"] != HIDDEN and bool(password if colon else match["scheme"].startswith("http"))


def _is_secret_pair(match: re.Match[str]) -> bool:
    return is_secret_name(match["name"]) and not _NO_SECRET.fullmatch(match["value"])


def _without_pairs(pattern: re.Pattern[str], text: str) -> str:
    parts, end = [], 0
    for match in pattern.finditer(text):
        if match.start("value") >= end and _is_secret_pair(match):  # else part of a value that is hidden already
            parts += [text[end : match.start("value")], HIDDEN]
            end = match.end("value")
    return "".join([*parts, text[end:]])


def _environment_secrets() -> list[str]:
    """The longest first: one may be part of another."""
    found = {value for name, value in os.environ.items() if is_secret_name(name)}
    found |= {password for value in os.environ.values() if "@" in value for password in _passwords(value)}
    return sorted((value for value in found if len(value) >= _SHORTEST_IN_ENVIRONMENT), key=len, reverse=True)


def _passwords(text: str) -> Iterator[str]:
    """As they stand in URLs, and as a server would repeat them."""
    for match in _USER_INFO.finditer(text):
        if _is_secret_user_info(match):
            password = match["user_info"].partition(":")[2] or match["user_info"]
            yield from (password, unquote(password))
