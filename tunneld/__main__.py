"""`python -m tunneld` is `tunneld`."""

import sys

from tunneld.cli.tunneld import main

if __name__ == "__main__":
    sys.exit(main())
