"""`python -m cacheslide.cli` is the `cacheslide` command."""

import sys

from cacheslide.cli.main import main

sys.exit(main())
