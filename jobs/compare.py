"""Compare a bundle's answers with its checkpoint's in PyTorch, or with another bundle's.

    python jobs/compare.py --checkpoint DIR --bundle DIR --input PATH... --output DIR

Writes `comparison.parquet`, `summary.json` and `report.html`. Runs on this machine, or, under
`ray job submit`, on the cluster's head.
"""

import sys

from comparison.config import CompareConfig
from qvl_batch.command_line import settings, stop_as_by_ctrl_c
from qvl_batch.errors import JobError


def main() -> int:
    """Compare; 0 if everything is within its bounds, 1 if not or if it could not be done."""
    stop_as_by_ctrl_c()
    try:
        config = settings(CompareConfig)
        from comparison.run import compare  # noqa: PLC0415  (takes seconds to import; --help need not)

        outcome = compare(config, say=lambda line: print(line, file=sys.stderr, flush=True))
        print(outcome)
    except JobError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    for reason in outcome.summary["verdict"]["reasons"]:
        print(f"compare: {reason}", file=sys.stderr)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
