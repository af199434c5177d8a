"""Entry point of ``tnadapt`` and ``python -m tnadapt``. Users' mistakes print one line, not a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from tnadapt.cli import app
        from tnadapt.cli.terminal import exit_on_error
    except ImportError as error:
        print(f'tnadapt: the command line needs its extra: pip install "tnadapt[cli]" ({error})', file=sys.stderr)
        raise SystemExit(2) from None
    with exit_on_error("tnadapt"):
        app()


if __name__ == "__main__":
    main()
