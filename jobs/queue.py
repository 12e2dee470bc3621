"""What the services of queues and memory banks on a cluster hold at this moment.

    python -m jobs.queue status [--address HOST:PORT]

One line per shard, then one per rank: how far its replica lags, how long its last step waited for keys, what its last
exchange took. A shard that is being restarted shows as such; the run goes on when it is back.
"""

from typing import Any

from pipeline.arguments import JobParser
from pipeline.errors import explained


def main() -> None:
    """Parse the command line, print the tables."""
    parser = JobParser(__doc__)
    parser.add_argument("action", choices=["status"])
    parser.add_argument("--address", help="of a running Ray; default: $RAY_ADDRESS, or the one on this machine")
    arguments = parser.read()
    from pipeline.cluster.connection import joined  # Ray takes 3 s to import; --help should not cost them
    from pipeline.cluster.shards import status

    with explained(), joined(arguments.address):
        queues = status()
    if not queues:
        print("no run on this cluster serves negatives")
    for run_id, shards in queues.items():
        print(table(run_id, shards))


def table(run_id: str, shards: list[dict[str, Any]]) -> str:
    """One run's shards and ranks, for a person."""
    lines = [run_id]
    for shard in shards:
        if not shard["open"]:
            lines.append(f"  {shard['name']}  not open: it is starting, or waits for the ranks to fill it again")
            continue
        lines.append(
            f"  {shard['name']}  {shard['holds']}  step {shard['step']} + {shard['steps_in_flight']} in flight  "
            f"takes {shard['held_bytes'] / 2**20:.1f} MiB  took {shard['received_bytes'] / 2**20:.1f} MiB, "
            f"{shard['duplicates']} duplicates  pid {shard['pid']} on {shard['node'][:8]}"
        )
    callers: list[dict[str, float]] = next((shard["callers"] for shard in shards if shard["open"]), [])
    lines += [
        f"  rank {caller['rank']:.0f}  staleness {caller['staleness']:.0f} steps  "
        f"waited {caller['waited_ms']:.1f} ms  exchange {caller['exchange_ms']:.1f} ms  "
        f"{caller['step_bytes'] / 2**10:.0f} KiB"
        for caller in sorted(callers, key=lambda caller: caller["rank"])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
