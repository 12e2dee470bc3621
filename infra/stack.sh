#!/usr/bin/env bash
# The real services on this machine, for trying things out: SeaweedFS (S3), MLflow, a Ray head, all on loopback.
#
#     infra/stack.sh up|status|down [FOLDER]        FOLDER: where data, logs and keys lie, default .parallax/stack
#     eval "$(infra/stack.sh up)"                   starts what is not running and exports how to reach it
#
# Linux only. Needs `pip install -e '.[stack]'` in the environment whose python comes first on PATH.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/stack.py" "$@"
