"""``python -m paper``: as on tnadapt's command line, a user error prints one line and exits with code 2."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from tnadapt.cli.terminal import exit_on_error

        from .command import app
    except ImportError as error:
        print(f'paper: the recipes need an extra: pip install -e ".[paper]" ({error})', file=sys.stderr)
        raise SystemExit(2) from None
    with exit_on_error("paper"):
        app()


if __name__ == "__main__":
    main()
