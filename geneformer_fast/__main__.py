"""``python -m geneformer_fast`` is ``geneformer-fast``."""

from __future__ import annotations

import sys

from geneformer_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
