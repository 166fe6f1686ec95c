"""Answer prompts about images, or conversations, of folders and files of many kinds.

    python jobs/caption.py --bundle BUNDLE --input PATH... --output DIR

Runs on this machine, or, under `ray job submit`, on the cluster.
"""

import os
import sys

from qvl_batch.command_line import FAILED, STOPPED, exit_status, settings, stop_as_by_ctrl_c
from qvl_batch.config import CaptionConfig


def main() -> int:
    """Run the job, or forecast it; 0 if every row has an answer or an error, 1 if the job failed or no row was
    answered, 130 if it was stopped.
    """
    is_stopped = stop_as_by_ctrl_c()
    resume_command = "the same command"

    def work() -> int:
        nonlocal resume_command
        config = settings(CaptionConfig)
        resume_command = config.going_on

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        # Ray takes a second to import; --help need not.
        if config.plan is not None:
            from qvl_batch.forecast.run import forecast  # noqa: PLC0415

            print(forecast(config, say, is_stopped))
            return 0
        from qvl_batch.pipeline.run import run  # noqa: PLC0415

        report = run(config, say, is_stopped)
        print(report)
        if report.total.rows and report.total.rows == report.total.finish_reasons["error"]:
            print("caption: no row was answered; the reasons are in the column error_message", file=sys.stderr)
            return FAILED
        return 0

    return exit_status("caption", work, stopped=lambda: f"continue with {resume_command}")


if __name__ == "__main__":
    status = main()
    if status == STOPPED:
        # In a regular exit of the interpreter, threads of Ray that are just starting can crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
