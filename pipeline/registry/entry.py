"""What a registry entry holds, and how it is tied to the registry.

Whoever can write to the artifact store can swap an entry's files together with the ``card.json`` that lists their
hashes. So an entry also holds ``SHA256SUMS``, a line for each file (``sha256sum -c SHA256SUMS`` checks them), and the
SHA-256 of that list is a tag of the version: it lies in the registry's database, not beside the files.
"""

import logging
from pathlib import Path

from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline.export import BUNDLE_FILES, sha256
from pipeline.registry.address import RegistryError

FILES_TAG = "parallax.files_digest"  # the SHA-256 of SHA256SUMS
ARCHIVE = "model.pt2"  # what MLflow loads; the bundle's other files are extra_files/
EXTRA_FILES = tuple(name for name in BUNDLE_FILES if name != ARCHIVE)
ENTRY_FILES = (
    *("MLmodel", "python_env.yaml", "requirements.txt", f"data/{ARCHIVE}"),
    *(f"extra_files/{name}" for name in EXTRA_FILES),
)
_SUMS = "SHA256SUMS"

_logger = logging.getLogger(__name__)


def seal(folder: Path) -> str:
    """Write ``SHA256SUMS`` over the files of a complete entry; returns the digest for FILES_TAG."""
    (folder / _SUMS).write_text("".join(f"{sha256(folder / path)}  {path}\n" for path in ENTRY_FILES))
    return sha256(folder / _SUMS)


def fetch(source: str, digest: str, folder: Path) -> None:
    """Fetch the entry at the artifact URI ``source`` into ``folder``: the files that ``digest`` stands for, no others.

    RegistryError names the first file that is missing or is not the one that was registered. Files beside them stay
    where they are; a warning names them.
    """
    repository = _repository(source)
    _fetch_file(repository, _SUMS, digest, folder)
    lines = (folder / _SUMS).read_text(errors="replace").splitlines()
    sums = {path: sha for sha, _, path in (line.partition("  ") for line in lines)}
    if sums.keys() != {*ENTRY_FILES}:
        raise RegistryError(
            f"{_SUMS} lists {', '.join(sums) or 'no files'}; an encoder of this version of Parallax has "
            f"{', '.join(ENTRY_FILES)}: register it again with this version"
        )
    for path in ENTRY_FILES:
        _fetch_file(repository, path, sums[path], folder)
    if others := sorted(_listed(repository) - {_SUMS, *ENTRY_FILES}):
        _logger.warning("%s holds files that were not registered; not fetched: %s", source, ", ".join(others))


def _repository(source: str) -> ArtifactRepository:
    try:
        return get_artifact_repository(source)
    except Exception as error:  # a scheme without a repository, a package that is missing, a LoggedModel that is gone
        raise RegistryError(f"its files cannot be reached at {source}: {error}") from error


def _fetch_file(repository: ArtifactRepository, path: str, expected: str, folder: Path) -> None:
    try:
        repository.download_artifacts(path, str(folder))
    except Exception as error:  # every store has exceptions of its own: name them all, keep the cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise RegistryError(f"{path} cannot be fetched from {repository.artifact_uri}: {reason:.200}") from error
    file = folder / path
    found = sha256(file) if file.is_file() else "no file"
    if found != expected:
        raise RegistryError(
            f"{path} is not what was registered: SHA-256 {found}, registered was {expected}; restore it at "
            f"{repository.artifact_uri}, or delete this version and submit the run that trained it again"
        )


def _listed(repository: ArtifactRepository) -> set[str]:
    """The files where an entry's files lie, and folders that an entry has not (with a slash at the end)."""
    folders = {path.rpartition("/")[0] for path in ENTRY_FILES}
    try:
        found = [info for folder in folders for info in repository.list_artifacts(folder or None)]
    except Exception as error:
        raise RegistryError(f"{repository.artifact_uri} cannot be listed: {error}") from error
    return {f"{info.path}/" if info.is_dir else info.path for info in found if info.path not in folders}
