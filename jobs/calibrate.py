"""Say how far confidence can be trusted, by answers whose truth is known, and from which confidence on they are right.

    python jobs/calibrate.py --answers DIR --expected-column expected --target-precision 0.99

Writes `calibration.json` and `calibration.html`. The threshold that it finds is for `jobs/caption.py --abstain-below`.
"""

import sys

from calibration.config import CalibrateConfig
from qvl_batch.command_line import FAILED, exit_status, settings


def work() -> int:
    """Calibrate and show; returns the exit status."""
    config = settings(CalibrateConfig)
    from calibration.run import calibrate  # noqa: PLC0415  (takes a second to import; --help need not)

    outcome = calibrate(config)
    print(outcome)
    return 0 if outcome.holds else FAILED


def main() -> int:
    """Run the command; 0 if a threshold reaches the target, 1 if none does or if it failed, 130 if it was stopped."""
    return exit_status("calibrate", work)


if __name__ == "__main__":
    sys.exit(main())
