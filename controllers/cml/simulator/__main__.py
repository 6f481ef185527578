"""`python -m controllers.cml.simulator`."""

import sys

from controllers.cml.simulator.command import main

sys.exit(main())
