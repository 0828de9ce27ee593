"""`latentzoom manifests`: write infra/ anew from infra/values.yaml, or check that it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="latentzoom manifests", description="Generate container, cluster, tracking and monitoring files."
    )
    add = parser.add_argument
    add("--values", type=Path, default=Path("infra/values.yaml"), help="the one set of values")
    add("--out", type=Path, default=None, help="folder to write to; default: where the values are")
    add("--check", action="store_true", help="write nothing; exit status 1 when a file is not what would be written")
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from orchestration.infra.files import generate
    from orchestration.infra.values import load_values

    out = arguments.out or arguments.values.parent
    files = generate(load_values(arguments.values))
    changed = [n for n, text in files.items() if not (out / n).is_file() or (out / n).read_text() != text]
    for name in changed:
        if not arguments.check:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(files[name])
        print(f"{'differs' if arguments.check else 'wrote'}: {out / name}")
    print(f"{len(files)} files, {len(changed)} {'differ' if arguments.check else 'written'}")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
