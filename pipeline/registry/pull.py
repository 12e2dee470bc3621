"""A registered encoder by name: resolved to one version once, then fetched whole and checked.

An alias can move between two lookups. Whoever acts on an encoder resolves once and names the version from then on.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.registry.address import RegistryError
from pipeline.registry.entry import FILES_TAG, fetch
from pipeline.registry.tracking import connect, server_errors

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+))")


class Resolved(NamedTuple):
    """One version in the registry."""

    name: str
    version: int
    source: str  # models:/m-..., the LoggedModel that the version points at
    digest: str  # of all its files, as they were registered
    registry_uri: str


class Pulled(NamedTuple):
    """An entry on this machine."""

    name: str
    version: int
    digest: str  # of all its files
    registry_uri: str
    folder: Path  # MLmodel, data/model.pt2, extra_files/


def resolve(model_uri: str, tracking_uri: str) -> Resolved:
    """``models:/name@alias`` or ``models:/name/version`` -> the version.

    RegistryError names what exists where there is none, and one of which nothing says which files were registered.
    """
    match = _MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise RegistryError(
            f"{model_uri!r} does not name a registered model; e.g. models:/parallax-encoder@champion "
            "or models:/parallax-encoder/3"
        )
    client = connect(tracking_uri, must_exist=True)
    name, alias, version = match["name"], match["alias"], match["version"]
    with server_errors(tracking_uri):
        try:
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise RegistryError(
                f"{model_uri} is not in the registry at {tracking_uri}; {_what_exists(client, name)}"
            ) from error
    if FILES_TAG not in found.tags:
        raise RegistryError(
            f"{name} version {found.version} in {tracking_uri} has no tag {FILES_TAG}, so nothing says which files it "
            "was registered with: other code than this registered it, or the tag was deleted; name another version, or "
            "submit the run that trained it again, which registers a new one"
        )
    return Resolved(name, int(found.version), found.source, found.tags[FILES_TAG], client.tracking_uri)


def pull(model_uri: str, tracking_uri: str, out_dir: Path) -> Pulled:
    """Fetch a whole entry into ``out_dir``, which must not exist yet; it appears there only when it is complete.

    Raises RegistryError if there is no such model, the server does not answer, or a file is not what was registered.
    """
    out_dir = out_dir.absolute()
    if out_dir.exists():
        raise RegistryError(f"{out_dir} exists already; name a folder that does not, e.g. {_free(out_dir)}")
    resolved = resolve(model_uri, tracking_uri)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    except OSError as error:
        raise RegistryError(
            f"{out_dir} cannot be made: {error.strerror}; name a folder below one that you may write to, e.g. "
            f"{Path.cwd() / 'encoder'}"
        ) from error
    try:
        try:
            fetch(resolved.source, resolved.digest, folder)
        except RegistryError as error:
            raise RegistryError(f"{resolved.name} version {resolved.version} in {tracking_uri}: {error}") from error
        folder.chmod(0o755)
        os.rename(folder, out_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Pulled(resolved.name, resolved.version, resolved.digest, resolved.registry_uri, out_dir)


def _what_exists(client: MlflowClient, name: str) -> str:
    models = {model.name: model for model in client.search_registered_models(max_results=20)}
    if name not in models:
        return "registered models: " + (", ".join(sorted(models)) or "none, run python -m jobs.pretrain first")
    versions = client.search_model_versions(f"name = '{name}'", max_results=20)
    aliases = ", ".join(f"@{alias} (version {version})" for alias, version in models[name].aliases.items())
    numbers = ", ".join(sorted((str(version.version) for version in versions), key=int))
    return f"aliases of {name}: {aliases or 'none'}; versions: {numbers or 'none'}"


def _free(taken: Path) -> Path:
    number = 2
    while (candidate := taken.with_name(f"{taken.name}-{number}")).exists():
        number += 1
    return candidate
