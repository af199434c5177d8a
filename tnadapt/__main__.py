"""Entry point of ``tnadapt`` and ``python -m tnadapt``, where user errors print one line, not a traceback."""

from __future__ import annotations

import sys

# Shown if the libraries of the command line are not installed.
_HELP = """Usage: tnadapt [OPTIONS] COMMAND [ARGS]...

Fine-tune, plan, convert and merge adapters with few parameters.

The commands (finetune, predict, presets, plan, extract, convert, merge, info, verify) need the extra "cli",
and finetune and predict the extra "demo":

    pip install "tnadapt[cli]"

The library itself does not: import tnadapt."""


def main() -> None:
    """Run the command line."""
    try:
        from tnadapt.cli import app
        from tnadapt.cli.terminal import exit_on_error
    except ImportError as error:
        if sys.argv[1:] == ["--version"]:
            from tnadapt import __version__

            print(f"tnadapt {__version__}")
            raise SystemExit(0) from None
        if not sys.argv[1:] or sys.argv[1:] in (["-h"], ["--help"]):
            print(_HELP)
            raise SystemExit(0) from None
        print(f'tnadapt: the command line needs its extra: pip install "tnadapt[cli]" ({error})', file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    with exit_on_error("tnadapt"):
        app()


if __name__ == "__main__":
    main()
