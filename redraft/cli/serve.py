"""`redraft serve MODEL`: an OpenAI-compatible server."""

import contextlib
import hashlib
import logging
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from redraft.cli.common import load_quietly
from redraft.cli.parsing import LoadingFlags, parse
from redraft.settings import Count, Natural, NonNegative

if TYPE_CHECKING:
    from redraft.serving.app import Backend

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIN_KEY_CHARACTERS = 16
GONE_SECONDS = 60
"""A connection ends where its client's machine has acknowledged nothing, or taken nothing, for so long."""


@dataclass(frozen=True, kw_only=True)
class ServeFlags(LoadingFlags):
    """Serve a model to clients of the OpenAI API, many at once. Ctrl-C or SIGTERM finishes what runs and ends."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own needs --api-key-file."""
    port: Natural = 8000
    """Port to listen at; 0 takes a free one."""
    max_rows: Count = 8
    """Texts that are generated at once."""
    max_model_len: Count | None = None
    """Longest prompt and answer together, in tokens; by default the model's context. Memory grows with it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Type of the weights; auto: as they are saved."""
    compile: bool = False
    """Compile the model with torch: slower to start, faster on GPUs."""
    api_key_file: Path | None = None
    """File with one key per line; clients send one as `Authorization: Bearer KEY`."""
    insecure: bool = False
    """Listen at any address without keys."""
    cors_origin: tuple[str, ...] = ()
    """Origins whose web pages may call the server from a browser, e.g. https://example.org."""
    grace: NonNegative = 30.0
    """Seconds that running requests get to finish when the server is told to end."""
    max_queue: Count = 64
    """Requests that may wait; more are refused with 429."""
    adapter: tuple[str, ...] = ()
    """Adapters of the model, each NAME=FOLDER; clients choose one by its name as `model`."""


def main(arguments: list[str]) -> int:
    """Check what can be checked at once, then serve until a signal."""
    flags = parse(ServeFlags, arguments, command="serve")
    adapters = _adapters(flags.adapter)
    hashes = [] if flags.api_key_file is None else read_keys(flags.api_key_file)
    if flags.host not in LOOPBACK and not hashes and not flags.insecure:
        raise ValueError(
            f"anybody could use a server at {flags.host}: give --api-key-file, or --insecure if that is meant."
        )
    if model_name(flags.model) in adapters:
        raise ValueError(f"--adapter {model_name(flags.model)}: that is the name of the model. Choose another one.")
    from redraft.serving.app import DrainingServer, Service

    listener = listen(flags.host, flags.port)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    ready = f"redraft serve: {model_name(flags.model)} at http://{host}:{listener.getsockname()[1]}"
    service = Service(
        partial(open_backend, flags, adapters),
        key_hashes=hashes,
        cors_origins=flags.cors_origin,
        when_ready=partial(print, ready, flush=True),
    )
    with _lines_of_requests():
        DrainingServer(service, grace=flags.grace).run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    return 0


def open_backend(flags: ServeFlags, adapters: dict[str, str]) -> "Backend":
    """Load the model and its adapters, start the engine, and warm it up. Raises ValueError for what does not fit."""
    from redraft.constraints.kinds import Constraint
    from redraft.models.device import free_bytes
    from redraft.models.finite import is_out_of_memory
    from redraft.serving.app import Backend
    from redraft.serving.compiling import Compiler, LimitedConstraint
    from redraft.serving.engine import Engine

    load = partial(load_quietly, device=flags.device, quantization=flags.quantization, dtype=flags.dtype)
    try:
        base = load(flags.model, compile=flags.compile)
        models = {name: load(flags.model, compile=flags.compile, adapter=folder) for name, folder in adapters.items()}
        if base.tokenizer is None:
            raise ValueError(f"a server needs texts, and {flags.model} has no tokenizer. Save one with the model.")
        engine = Engine(
            base,
            max_rows=flags.max_rows,
            max_model_len=flags.max_model_len,
            max_queue=flags.max_queue,
            adapters=models,
        )
        check_memory(flags, engine.needed_bytes(), free_bytes(base.denoiser.device))
        engine.start()
        engine.warm_up()
    except (RuntimeError, MemoryError) as error:  # that of torch for a GPU is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"{flags.model} does not fit into the memory with --max-rows {flags.max_rows}. Lower it or "
            "--max-model-len, or use --quantization."
        ) from error
    compiler, named = Compiler(), {model_name(flags.model): base} | models
    for lm in named.values():  # start the worker, and read the vocabulary; clients are told what fails
        with contextlib.suppress(ValueError):
            lm.compile_constraint(LimitedConstraint(constraint=Constraint(), compiler=compiler))
    return Backend(engine=engine, models=named, max_model_len=engine.max_model_len, compiler=compiler)


def check_memory(flags: ServeFlags, needed: int, free: int | None) -> None:
    """Raise ValueError where full batches would not fit: a machine without memory ends a process without a word."""
    if free is not None and needed > free:
        fitting = max(1, flags.max_rows * free // needed)
        raise ValueError(
            f"--max-rows {flags.max_rows} needs {needed / 2**20:,.1f} MiB for keys, values and logits beside the "
            f"weights, and {free / 2**20:,.1f} MiB are free. Lower --max-rows (to {fitting}) "
            "or --max-model-len."
        )


def model_name(model: str) -> str:
    """Name a model for clients: a hub id as it is, a folder by its last part, so that no path is told."""
    return Path(model).resolve().name if Path(model).exists() else model


def read_keys(path: Path) -> list[bytes]:
    """Read keys, one per line, and return their SHA-256 hashes. Raises ValueError; no message holds a key."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"cannot read the keys in {path}: {reason}.") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or min(map(len, keys)) < MIN_KEY_CHARACTERS:
        what = "no key" if not keys else f"a key of {min(map(len, keys))} characters"
        raise ValueError(
            f"{path} must hold keys of at least {MIN_KEY_CHARACTERS} characters, one per line; got {what}."
        )
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def _adapters(given: tuple[str, ...]) -> dict[str, str]:
    """Read NAME=FOLDER. Raises ValueError for another form, a name that stands twice, and a folder without adapter."""
    adapters: dict[str, str] = {}
    for one in given:
        name, _, folder = one.partition("=")
        if not name or not folder or name in adapters:
            raise ValueError(f"--adapter must be NAME=FOLDER, each name once; got {one!r}.")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"--adapter {name}: {folder} holds no adapter (no adapter_config.json).")
        adapters[name] = folder
    return adapters


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded. Raises ValueError where that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # connections inherit it: one whose client takes nothing is not kept for ever
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * GONE_SECONDS)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE_SECONDS)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror or str(error) if isinstance(error, OSError) else "a port is at most 65535"
        raise ValueError(f"cannot listen at {host}, port {port}: {reason}. Choose another --port or --host.") from error
    return listener


@contextlib.contextmanager
def _lines_of_requests() -> Iterator[None]:
    """Write a line for each request to standard output: ids, counts and times, no texts."""
    log, handler = logging.getLogger("redraft.serving"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True
