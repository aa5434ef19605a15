"""``python -m hookedlm``: the command line of `hookedlm.cli`."""

import sys

from hookedlm.cli import main

sys.exit(main())
