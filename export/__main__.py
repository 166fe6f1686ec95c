"""`python -m export`: see `export.package`."""

import sys

from export.package import main

sys.exit(main())
