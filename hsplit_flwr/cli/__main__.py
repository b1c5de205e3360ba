"""``python -m hsplit_flwr.cli``."""

import sys

from hsplit_flwr.cli import main

if __name__ == "__main__":
    sys.exit(main())
