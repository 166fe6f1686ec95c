"""Answer the prompts of image/prompt parquet files.

    python jobs/caption.py --bundle BUNDLE --input PATH... --output DIR

Runs on this machine, or, under `ray job submit`, on the cluster.
"""

import signal
import sys

import tyro

from qvl_batch.config import CaptionConfig
from qvl_batch.errors import JobError


def main() -> int:
    """Run the job; 0 if every row was answered or has its error, 1 if the job could not be done."""
    # A cluster ends jobs by SIGTERM: stop as Ctrl-C does, so that no answer is lost.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    going_on = "the same command"
    try:
        config = tyro.cli(CaptionConfig, config=(tyro.conf.FlagCreatePairsOff,))
        going_on = config.going_on
        from qvl_batch.pipeline import run  # noqa: PLC0415  (ray takes a second to import; --help need not)

        print(run(config, say=lambda line: print(line, file=sys.stderr, flush=True)))
    except JobError as error:
        print(f"caption: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("; ".join(["caption: stopped", *map(str, stop.args), f"{going_on} goes on"]), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
