"""Where runs are tracked: one order of precedence for every job, and sqlite files whose paths hold any character.

The option or the config's key comes first, then MLFLOW_TRACKING_URI, then the default. Addresses are saved and
shown, so none holds a secret: user and password of the variable's URI move into MLflow's own variables. Nothing here
imports MLflow.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from pipeline import storage
from pipeline.errors import UserError

VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"


class RegistryError(UserError):
    """The tracking server or the registry cannot do what was asked; the message says what would work."""


class Address(NamedTuple):
    """A tracking URI, in the form that never changes, and what it was taken from."""

    uri: str
    source: str


def default_uri(storage_url: str = ".parallax") -> str:
    """``mlflow.db`` in the storage folder; in ./.parallax where storage is remote."""
    folder = ".parallax" if storage.is_remote(storage_url) else storage_url
    return sqlite_uri(Path(storage.resolve(folder)) / "mlflow.db")


def choose(given: str, key: str, default: str) -> Address:
    """What ``key`` was given, else $MLFLOW_TRACKING_URI, else the default. RegistryError names the culprit.

    Where it is the variable's, MLFLOW_TRACKING_USERNAME and _PASSWORD hold its user and password from now on.
    """
    address = _first(given, key, default)
    if address.source == VARIABLE:
        os.environ.update(_without_credentials(os.environ[VARIABLE])[1])
    return address


def _first(given: str, key: str, default: str) -> Address:
    variable, _ = _without_credentials(os.environ.get(VARIABLE, ""))
    source = key if given else VARIABLE if variable else "the default"
    try:
        return Address(normalized(given or variable or default), source)
    except RegistryError as error:
        raise RegistryError(f"{source}={error}") from error


def _without_credentials(uri: str) -> tuple[str, dict[str, str]]:
    """A URI less its user and password, and the variables for these. One that has not both is left as it is."""
    match = re.fullmatch(r"(?P<scheme>https?://)(?P<user>[^/?#:]+):(?P<password>[^/?#]+)@(?P<rest>[^@]+)", uri)
    if match is None:
        return uri, {}
    user, password = unquote(match["user"]), unquote(match["password"])
    variables = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return match["scheme"] + match["rest"], variables


def source_of(uri: str, key: str, default: str) -> str:
    """What ``choose`` took ``uri`` from; where two places say the same, the one that counts without the key."""
    try:
        fallback = _first("", key, default)
    except RegistryError:  # a variable that is wrong, and was not looked at
        return key
    return fallback.source if fallback.uri == uri else key


def choose_to_read(option: str | None) -> Address:
    """The address of a job that reads the registry. RegistryError names the places that were looked at."""
    address = choose(option or "", "--tracking-uri", default_uri())
    path = sqlite_path(address.uri)
    if path is None or os.path.exists(path):
        return address
    if address.source == "the default":
        raise RegistryError(
            f"no registry: --tracking-uri is not given, {VARIABLE} is not set, and there is no file {path}, where runs "
            "of this folder are tracked by default; give --tracking-uri as the run's last lines name it (with a local "
            "storage.url it is sqlite:///<storage.url>/mlflow.db)"
        )
    raise RegistryError(
        f"{address.source}={address.uri}: there is no file {path}; name the one that runs were tracked in"
    )


def normalized(uri: str) -> str:
    """The same address with an absolute path and no trailing slash. RegistryError on one that cannot work."""
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
        return uri.rstrip("/")
    path = sqlite_path(uri)
    if path is None:
        raise RegistryError(
            f"{uri!r} is neither a server nor a sqlite file; e.g. http://127.0.0.1:5000 or sqlite:////home/me/mlflow.db"
        )
    return sqlite_uri(path)


def _check_server(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        is_address = bool(parts.hostname) and parts.port != 0
        is_root = is_address and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:  # its text would repeat what may be half a password
        is_root = False
    if not is_root:
        raise RegistryError(
            f"{uri!r} is not the root of a server, without user, token, query and '#'; e.g. http://127.0.0.1:5000. Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where it asks for them"
        ) from None


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite URI, in which %XX is an escape and ~ the home directory; None if it is another URI."""
    text, options, _ = uri.removeprefix(_SQLITE).partition("?")
    if not uri.startswith(_SQLITE) or text in ("", ":memory:"):
        return None
    if options:
        raise RegistryError(
            f"{uri!r} has options after a '?'; leave them out, and write '?' in a path as %3F, '%' as %25"
        )
    home, _, below = text.partition("/")
    try:
        path = Path(home).expanduser() / unquote(below) if home.startswith("~") else Path(unquote(text))
    except RuntimeError as error:
        raise RegistryError(f"{uri!r}: {home} is nobody's home directory; write the path out") from error
    return path.absolute()


def sqlite_uri(path: Path) -> str:
    """The URI of a sqlite file, escaped only where SQLAlchemy would read something else.

    Then its slashes are too: MLflow makes the folders of the path as it is written, escapes and all.
    """
    text = str(path)
    if "?" in text or unquote(text) != text:
        text = "/" + quote(text[1:], safe="")
    return f"{_SQLITE}{text}"
