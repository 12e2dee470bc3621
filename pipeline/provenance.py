"""Which code made an encoder."""

import os
import subprocess
from pathlib import Path


def git_sha() -> str:
    """The commit of this code, with ``-dirty`` if it was changed since; $PARALLAX_GIT_SHA where there is no
    checkout (an image, a Ray job's working directory); else "unknown"."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout around us is of another project
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../jobs")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (subprocess.CalledProcessError, FileNotFoundError):  # not a checkout, or no git
        return os.environ.get("PARALLAX_GIT_SHA", "unknown")
