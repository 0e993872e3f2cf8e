"""`python -m lit_adapters.cli` is `lit-adapters`."""

from __future__ import annotations

from lit_adapters.cli.commands import main

if __name__ == "__main__":
    main()
