"""`latentzoom manifests`: write infra/ anew from infra/values.yaml, or check that it is up to date. What
differs there is replaced only where that is asked for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.beside import replacing
from pipeline.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="latentzoom manifests", description="Generate container, cluster, tracking and monitoring files."
    )
    add = parser.add_argument
    add("--values", type=Path, default=Path("infra/values.yaml"), help="the one set of values")
    add("--out", type=Path, default=None, help="folder to write to; default: where the values are")
    add("--overwrite", action="store_true", help="replace files there that are not what would be written")
    add("--check", action="store_true", help="write nothing; exit status 1 when a file is not what would be written")
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from orchestration.infra.files import generate
    from orchestration.infra.values import load_values

    out = arguments.out or arguments.values.parent
    files = generate(load_values(arguments.values))
    found = {name: _read(out / name) for name in files}
    changed = [name for name, text in files.items() if found[name] != text.encode()]
    others = [name for name in changed if found[name] is not None]
    if others and not (arguments.check or arguments.overwrite):
        more = f", and so are {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{out / others[0]} is there already, and not what these values give{more}; --overwrite replaces such "
            "files, --check only names them, or write to another place by --out"
        )
    for name in changed:
        if not arguments.check:
            try:
                with replacing(out / name) as stream:
                    stream.write(files[name].encode())
            except OSError as error:
                raise UserError(f"cannot write {out / name}: {error.strerror or error}") from error
        print(f"{'differs' if arguments.check else 'wrote'}: {out / name}")
    print(f"{len(files)} files, {len(changed)} {'differ' if arguments.check else 'written'}")
    return 1 if arguments.check and changed else 0


def _read(file: Path) -> bytes | None:
    """None where nothing is there."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
