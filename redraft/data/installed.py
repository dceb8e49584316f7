"""The Python sources of installed packages under permissive licences. They depend on the environment."""

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

PERMISSIVE = frozenset(
    {
        *("mit", "mit license", "the mit license", "the mit license (mit)", "mit-0", "mit-cmu"),
        *("bsd", "bsd license", "bsd-2-clause", "bsd 2-clause", "bsd 2-clause license", "0bsd"),
        *("bsd-3-clause", "bsd 3-clause", "bsd 3-clause license", "zero-clause bsd (0bsd)"),
        *("apache-2.0", "apache 2.0", "apache license 2.0", "apache 2.0 license", "apache license, version 2.0"),
        *("apache software license", "apache-2.0 with llvm-exception"),
        *("psf", "psf-2.0", "psfl", "python-2.0", "python software foundation license"),
        *("isc", "isc license", "isc license (iscl)"),
        *("unlicense", "the unlicense (unlicense)", "cc0-1.0", "public domain"),
        *("zlib", "zlib/libpng license", "bsl-1.0"),
    }
)
"""Licences as metadata name them: MIT, BSD, Apache, Python, ISC, public domain, zlib, Boost."""
SAY_NOTHING = ("osi approved", "dfsg approved")
LEFT_OUT = re.compile(
    r"(^|/)(\.\.|tests?|testing|test_data|_?vendor(ed)?|_?extern(al)?|third_?party|_distutils)/"
    r"|(^|/)(test_[^/]*|[^/]*_tests?|conftest|[^/]*_pb2(_grpc)?)\.py$"
)
"""Tests, copies of other packages, and code that protoc writes."""
GENERATED = re.compile(
    r"(auto(matically)?[- ]?generated|generated (by|from|with)\b|do not (edit|modify))", re.IGNORECASE
)
BEGINNING, LONGEST = 1000, 150_000
"""Characters in which a file says that it was generated; bytes above which it is a table rather than code."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An installed package that may be learnt."""

    name: str
    version: str
    licence: str
    """As its metadata declare it."""
    files: tuple[Path, ...]


def installed_packages() -> list[Installed]:
    """List the packages whose metadata declare a permissive licence and nothing else, by name."""
    found = {}
    for package in distributions():
        licence, name = permissive_licence(package.metadata), package.metadata["Name"]
        if licence and name and name.lower() not in found:  # the first is the one that Python imports
            files = [file for file in package.files or () if file.suffix == ".py" and not LEFT_OUT.search(str(file))]
            paths = tuple(sorted(Path(str(package.locate_file(file))) for file in files))
            found[name.lower()] = Installed(name=name, version=package.version, licence=licence, files=paths)
    return [found[name] for name in sorted(found)]


def package_documents(packages: list[Installed]) -> Iterator[tuple[Installed, Path, str]]:
    """Read the modules of packages, in order, each text once and none of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    seen = {_digest(path.read_bytes()) for path in stdlib.rglob("*.py") if "site-packages" not in path.parts}
    for package in packages:
        for path in package.files:
            try:
                content = path.read_bytes()
                text = content.decode("utf-8-sig")
            except (OSError, UnicodeDecodeError):
                continue  # a file that was removed, or one in another encoding
            if len(content) > LONGEST or not text.strip() or "\0" in text or GENERATED.search(text[:BEGINNING]):
                continue
            if (digest := _digest(content)) not in seen:
                seen.add(digest)
                yield package, path, text


def permissive_licence(metadata: Any) -> str | None:
    """Return the licence that the metadata of a package declare, or None where it is not clearly permissive.

    The first that is there decides: License-Expression (SPDX; all parts of AND, one of OR), the classifiers (all), the
    License field (its whole text).
    """
    if expression := metadata["License-Expression"]:
        choices = re.split(r"\s+OR\s+", expression.replace("(", "").replace(")", ""))
        allowed = [choice for choice in choices if _are_permissive(re.split(r"\s+AND\s+", choice))]
        is_clear = bool(allowed) and ("(" not in expression or len(allowed) == len(choices))
        return expression if is_clear else None
    listed = [c.rpartition("::")[2].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    if listed := [name for name in listed if name.lower() not in SAY_NOTHING]:
        return ", ".join(listed) if _are_permissive(listed) else None
    field = " ".join((metadata["License"] or "").split())
    parts = re.split(r"\s+(?:AND|OR)\s+", field)
    return field if _are_permissive(parts) else None


def _are_permissive(names: list[str]) -> bool:
    return all(name.strip().lower() in PERMISSIVE for name in names)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content.strip()).digest()
