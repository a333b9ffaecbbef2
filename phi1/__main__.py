"""`python -m phi1`, and `torchrun -m phi1 train RECIPE`."""

import sys

from phi1.cli import main

sys.exit(main())
