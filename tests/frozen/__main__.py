"""``python -m tests.frozen`` prints what moved, and exits with 1 if anything did."""

from __future__ import annotations

import argparse
import warnings

from . import names, numbers


def main() -> int:
    """Compare, or record anew."""
    parser = argparse.ArgumentParser(prog="python -m tests.frozen", description=__doc__)
    parser.add_argument("--write", action="store_true", help="record what moved anew")
    parser.add_argument("--sample", type=int, metavar="N", help="compare about N cases, evenly spread")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample")
    parser.add_argument("--names", action="store_true", help="the public names alone")
    options = parser.parse_args()
    if options.write and numbers.torch is None:
        parser.error("--write records layers of torch, too, and torch is not installed")
    warnings.simplefilter("ignore")  # of ranks that are larger than useful
    if options.write:
        if not options.names:
            numbers.write()
        names.write(names.current())
        return 0
    lines = [] if options.names else numbers.moved(options.sample, options.seed)
    lines += names.moved(names.current())
    print("\n".join(lines) or "nothing moved")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
