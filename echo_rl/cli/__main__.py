"""``python -m echo_rl.cli``."""

import sys

from echo_rl.cli import main

sys.exit(main())
