"""``python -m salekit`` is the ``salekit`` command."""

import sys

from salekit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
