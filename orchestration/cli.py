"""The `latentzoom` command: a table of verbs. Each verb is a module with `main(argv) -> exit status`."""

from __future__ import annotations

import importlib
import io
import os
import sys

from orchestration.interruptible import interruptible
from pipeline.command_log import recorded
from pipeline.common_options import COMMON, Common, answer, did_you_mean, out, split
from pipeline.errors import UserError, arrived, exit_status
from pipeline.old_spellings import modern
from pipeline.redact import cleaned_output

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("orchestration.verbs.demo", "enlarge photographs, then train, register and use a tiny model"),
    "preprocess": ("orchestration.verbs.preprocess", "images → shards with cached latents (and: verify)"),
    "train": ("orchestration.verbs.train", "one stage: autoencoder, decoder, denoiser or align"),
    "runs": ("orchestration.verbs.runs", "how far training runs are, and their curves"),
    "average": ("orchestration.verbs.average", "a run's bundle with weights averaged over another length"),
    "evaluate": ("orchestration.verbs.evaluate", "figures of a model on a data set"),
    "register": ("orchestration.verbs.register", "a bundle → a new version with alias candidate"),
    "promote": ("orchestration.verbs.promote", "candidate → champion, if it is better"),
    "rollback": ("orchestration.verbs.rollback", "champion → the version before"),
    "lineage": ("orchestration.verbs.lineage", "where a registered model comes from"),
    "generate": ("orchestration.verbs.generate", "draw new images at any height × width"),
    "upscale": ("orchestration.verbs.upscale", "enlarge images by any factor"),
    "serve": ("orchestration.verbs.serve", "a page to drop pictures on and zoom without end, and its HTTP interface"),
    "pipeline": ("orchestration.verbs.pipeline", "images → promoted model as one resumable job"),
    "submit": ("orchestration.verbs.submit", "any of these verbs as a job of a Ray cluster"),
    "jobs": ("orchestration.verbs.jobs", "a cluster's jobs, their state and logs"),
    "stop": ("orchestration.verbs.stop", "stop a job"),
    "doctor": ("orchestration.verbs.doctor", "what is wrong with this machine or cluster, and what to do"),
    "plan": ("orchestration.verbs.plan", "GPU hours, storage and cost of a data set, with the arithmetic"),
    "bench": ("orchestration.verbs.bench", "how fast every part is here, against the straightforward way"),
    "import": ("orchestration.verbs.import_weights", "existing weights → a bundle"),
    "export": ("orchestration.verbs.export", "a bundle → a folder for the Hugging Face hub, diffusers or ONNX"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Errors that a user can mend are one line and exit status 2, a defect of ours one line and 70. A run
    that was asked to stop and wrote a checkpoint is 75, anything else that is interrupted 130."""
    argv = sys.argv[1:] if argv is None else argv
    _say_any_name()
    with cleaned_output(argv), interruptible():
        return arrived(lambda: exit_status(lambda: _main(argv)))


def _main(argv: list[str]) -> int:
    common, (verb, *words) = _read(argv)
    return recorded(lambda: _run(verb, words), [verb, *words], common)


def _read(argv: list[str]) -> tuple[Common, list[str]]:
    """The common options, and the verb with its other words. They may stand before the verb too. After `submit VERB`
    they belong to the job."""
    place = 0
    while place < len(argv) and argv[place].partition("=")[0] in COMMON:
        place += 1 + (argv[place] in COMMON and bool(COMMON[argv[place]][0]))
    before, [verb, *words] = argv[:place], argv[place:] or [""]
    quiet = "--quiet" in before
    words = modern(verb, words, quiet=quiet)
    end = len(words)
    if verb == "submit":
        end = next((i for i, word in enumerate(words) if word in VERBS), end)
        quiet = quiet or "--quiet" in words[:end]
        words = words[: end + 1] + (modern(words[end], words[end + 1 :], quiet=quiet) if end < len(words) else [])
    common, own = split([*before, *words[:end]])
    return common, [verb, *own, *words[end:]]


def _say_any_name() -> None:
    """Names of files that are no text, or none that this terminal's encoding has, must end no work; neither must a
    standard output or standard error that is closed."""
    sys.stdout = open(os.devnull, "w") if sys.stdout is None else sys.stdout  # noqa: SIM115
    sys.stderr = open(os.devnull, "w") if sys.stderr is None else sys.stderr  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def _run(verb: str, rest: list[str]) -> int:
    if verb in ("", "-h", "--help", "help"):
        print(_help(), file=out())
        return 0 if verb else 2
    if verb in ("-V", "--version"):
        return _version()
    if verb == "--completion":
        from orchestration.completion import script

        print(script(rest[0] if rest else ""), end="", file=out())
        return 0
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS) or f"; use one of {', '.join(VERBS)}"
        raise UserError(f"no verb {verb!r}{near}")
    return int(importlib.import_module(VERBS[verb][0]).main(rest) or 0)


def _version() -> int:
    from orchestration.versions import versions

    found = versions()
    answer(", ".join(f"{name} {value}" for name, value in found.items()), found)
    return 0


def _help() -> str:
    lines = ["usage: latentzoom VERB ...", "", "Generate and upscale images at any size.", ""]
    lines += [f"  {verb:11} {text}" for verb, (_, text) in VERBS.items()]
    lines += ["", "options of every verb:"]
    lines += [f"  {f'{name} {metavar}'.rstrip():16} {text}" for name, (metavar, text) in COMMON.items()]
    lines += [
        "",
        "  --version        of latentzoom, torch and Ray, and the device",
        "  --completion bash|zsh|fish    a script that completes verbs and options",
        "",
        "NO_COLOR=1 prints without colours.",
    ]
    return "\n".join([*lines, "", "latentzoom VERB --help says more."])


if __name__ == "__main__":
    sys.exit(main())
