"""``python -m hsplit_flwr.experiments``; see `main`."""

import sys

from hsplit_flwr.experiments.main import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
