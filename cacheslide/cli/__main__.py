"""Runs the `cacheslide` command as `python -m cacheslide.cli`."""

import sys

from cacheslide.cli.main import main

sys.exit(main())
