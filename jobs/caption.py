"""Answer the prompts of image/prompt parquet files.

    python jobs/caption.py --bundle BUNDLE --input PATH... --output DIR

Runs on this machine, or, under `ray job submit`, on the cluster.
"""

import os
import sys

from qvl_batch.command_line import FAILED, STOPPED, exit_status, settings, stop_as_by_ctrl_c
from qvl_batch.config import CaptionConfig


def main() -> int:
    """Run the job; 0 if every row was answered or has its error, 1 if the job could not be done or no row was answered,
    130 if it was stopped.
    """
    is_stopped = stop_as_by_ctrl_c()
    going_on = "the same command"

    def work() -> int:
        nonlocal going_on
        config = settings(CaptionConfig)
        going_on = config.going_on
        from qvl_batch.pipeline.run import run  # noqa: PLC0415  (ray takes a second to import; --help need not)

        report = run(config, say=lambda line: print(line, file=sys.stderr, flush=True), is_stopped=is_stopped)
        print(report)
        if report.total.rows and report.total.rows == report.total.finish_reasons["error"]:
            print("caption: no row was answered; why not is in the column error_message", file=sys.stderr)
            return FAILED
        return 0

    return exit_status("caption", work, stopped=lambda: f"{going_on} goes on")


if __name__ == "__main__":
    status = main()
    if status == STOPPED:
        # Ray's threads that were just starting may crash where the interpreter ends in order.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
