"""``python -m salekit`` is the ``salekit`` command."""

import sys

if __name__ == "__main__":
    try:
        from salekit.cli.main import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
