"""``python -m gpurho``."""

from __future__ import annotations

import sys

from gpurho.cli import main

if __name__ == "__main__":
    sys.exit(main())
