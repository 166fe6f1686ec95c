"""Compare a bundle's answers with its checkpoint's in PyTorch, or with another bundle's.

    python jobs/compare.py --checkpoint DIR --bundle DIR --input PATH... --output DIR

Writes `comparison.parquet`, `summary.json` and `report.html`. Runs on this machine, or, under
`ray job submit`, on the cluster's head.
"""

import sys

from export.comparison.config import CompareConfig
from qvl_batch.command_line import FAILED, exit_status, settings, stop_as_by_ctrl_c


def work() -> int:
    """Compare and show; returns the exit status."""
    config = settings(CompareConfig)
    from export.comparison.run import compare  # noqa: PLC0415  (takes seconds to import; --help need not)

    outcome = compare(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(outcome)
    for reason in outcome.summary["verdict"]["reasons"]:
        print(f"compare: {reason}", file=sys.stderr)
    return 0 if outcome.passed else FAILED


def main() -> int:
    """Run the command; 0 if everything is within its bounds, 1 if not or if it failed, 130 if it was stopped."""
    stop_as_by_ctrl_c()
    return exit_status("compare", work, stopped=lambda: "continue with the same command")


if __name__ == "__main__":
    sys.exit(main())
