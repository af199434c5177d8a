"""``tnadapt`` and ``python -m tnadapt``: a user's mistake is one line and exit code 2, never a traceback."""

from __future__ import annotations

import sys

from tnadapt.errors import TnadaptError, escaped


def main() -> None:
    """Run the command line."""
    try:
        from tnadapt.cli import app
    except ImportError as error:
        print(f'tnadapt: the command line needs its extra: pip install "tnadapt[cli]" ({error})', file=sys.stderr)
        raise SystemExit(2) from None
    try:
        app()
    except (TnadaptError, OSError) as error:  # a full disk, a name that is too long
        print(escaped(f"tnadapt: {error}"), file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError as error:
        print(
            escaped(f"tnadapt: there is not enough memory for that ({str(error) or 'no more than that is known'})"),
            file=sys.stderr,
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
