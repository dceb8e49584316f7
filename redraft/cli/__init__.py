"""The command line: `redraft COMMAND ...`. Each command is a module with `main(arguments) -> exit code`."""

import logging
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from redraft.cli.output import flush_output, open_closed_output
from redraft.errors import unknown_name

COMMANDS = {
    "train": "train a model by a recipe, or go on with a run",
    "convert": "make a diffusion model of any model of transformers, or check one",
    "sample": "generate text from prompts",
    "infill": "fill the gaps in a text",
    "explain": "show in which order a text was decided, how surely, and what else it could have been",
    "chat": "talk with a model and watch its drafts form",
    "think": "think about prompts in blocks of continuous thought",
    "latent": "check the autoencoder of a thinking model",
    "data": "tokenise and pack a source once, for many runs",
    "eval": "measure a model on tasks: likelihood, generation, benchmarks",
    "compare": "test the difference between two evaluations",
    "doctor": "report versions, devices and whether a tiny model runs",
}
NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that tell, on every import, of kernels for other machines and of each other's names."""

EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # as of a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 a user's mistake, 130 interrupted, 141 where its output's reader left."""
    open_closed_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    code: Any = EXIT_NO_READER
    try:
        code = _dispatch(arguments)
    except BrokenPipeError:
        pass
    except SystemExit as exit_:
        if not isinstance(exit_.__context__, BrokenPipeError):  # at which rich ends the program
            code = exit_.code
    if (problem := flush_output()) and not isinstance(problem, BrokenPipeError):
        with suppress(OSError):
            print(f"redraft: the output could not be written: {problem.strerror}", file=sys.stderr)
        code = code or 1
    sys.exit(code or (EXIT_NO_READER if problem else code))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from redraft import __version__

        print(f"redraft {__version__}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise unknown_name("command", command, COMMANDS)
        return int(import_module(f"redraft.cli.{command}").main(rest))
    except ValueError as error:
        if _is_user_mistake(error):
            print(f"redraft {command}: {error}", file=sys.stderr)
            return EXIT_USER_MISTAKE
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _is_user_mistake(error: ValueError) -> bool:
    """Tell our own messages from a library's ValueError, whose traceback is worth seeing."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("redraft")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: redraft COMMAND [...]",
            "",
            "Diffusion language models: train, convert, sample, infill, chat.",
            "",
            *lines,
            "",
            "redraft COMMAND --help shows a command's settings with their defaults and units.",
        ]
    )
