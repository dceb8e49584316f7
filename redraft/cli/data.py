"""`redraft data build SOURCE OUT`: text or conversations to tokens on disk, once for many runs."""

from collections import Counter
from pathlib import Path

from redraft.cli.parsing import parse
from redraft.data.config import DataConfig
from redraft.errors import unknown_name

USAGE = """usage: redraft data build SOURCE OUT [--NAME VALUE ...]
       redraft data packages

packages: list what --data.source site-packages reads here, as a table: package, version, licence, files, bytes.

build: read, split, tokenise and pack SOURCE, and write the windows and the tokenizer into the folder OUT. Then
`redraft train RECIPE --data.source OUT` trains on it; seq_len, validation_fraction, kind and chat settings must be
those of the build. OUT appears only when it is complete; a build that was killed starts again from the beginning.

`redraft data build SOURCE OUT --help` lists the settings."""


def main(arguments: list[str]) -> int:
    """Build, and print what was written."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, *rest = arguments
    if command == "packages":
        return _print_packages(rest)
    if command != "build":
        raise unknown_name("command of redraft data", command, ["build", "packages"])
    if len(rest) < 2 or rest[0].startswith("-") or rest[1].startswith("-"):
        raise ValueError("redraft data build needs SOURCE and OUT. See redraft data --help.")
    source, out, *flags = rest
    config = parse(DataConfig, flags, command=f"data build {source} {out}", default=DataConfig(source=source))
    if config.streaming:
        raise ValueError("redraft data build writes the whole source; got --streaming. Leave it out.")

    from redraft.cli.common import plain_console
    from redraft.data.prepare import build_data

    data = build_data(config, Path(out).expanduser())
    console = plain_console()
    for name, report in (("train", data.train_report), ("validation", data.validation_report)):
        if report is not None:
            console.print(f"{name}: {report.describe(seq_len=config.seq_len)}")
    for name in ("seq_len", "validation_fraction"):  # a recipe may have others than the defaults here
        flag = f"--{name.replace('_', '-')}"
        if not any(each.split("=")[0] == flag for each in flags):
            flags += [flag, str(getattr(config, name))]
    same = " ".join(flag.replace("--", "--data.", 1) if flag.startswith("--") else flag for flag in flags)
    console.print(f"saved to {out}. To train on it: redraft train RECIPE --data.source {out} {same}")
    return 0


def _print_packages(rest: list[str]) -> int:
    if rest:
        raise ValueError(f"redraft data packages takes no arguments; got {rest[0]!r}. Leave it out.")
    from redraft.data.installed import installed_packages, package_documents

    packages, files, sizes = installed_packages(), Counter[str](), Counter[str]()
    for package, _, text in package_documents(packages):
        files[package.name] += 1
        sizes[package.name] += len(text.encode())
    if not files:
        raise ValueError("no installed package under a permissive licence has sources.")
    print("| package | version | licence | files | bytes |\n|---|---|---|---|---|")
    for one in packages:
        if files[one.name]:
            print(f"| {one.name} | {one.version} | {one.licence} | {files[one.name]:,} | {sizes[one.name]:,} |")
    print(f"| all | | | {files.total():,} | {sizes.total():,} |")
    return 0
