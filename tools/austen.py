"""Write Jane Austen's six novels, a text file per chapter: `python tools/austen.py FOLDER [--deb FILE]`.

They are in Debian's package r-cran-janeaustenr, which `apt-get download` fetches (Debian and Ubuntu; root is not
needed, nor is R). The texts are in the public domain, their transcription is under the MIT licence. Wrapped lines are
joined, a blank line separates paragraphs, verse keeps its lines; underscores around stressed words are left out, as
three of the six novels have none.

    python tools/austen.py austen && redraft train austen
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
TEXTS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
NOVELS = ("EMMA", "MANSFIELD PARK", "NORTHANGER ABBEY", "PERSUASION", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILITY")
HEADING = re.compile(r"(?P<kind>VOLUME|CHAPTER) [IVXLC\d]+", re.IGNORECASE)
NOT_AUSTEN = re.compile(r"A NOTE ON THE TEXT.*|\[End volume.*?\]|(THE END|FINIS)\s*\Z", re.IGNORECASE | re.DOTALL)
CHARACTER_VECTOR = 16


def novels_in(content: bytes) -> Iterator[list[str]]:
    """Yield the lines of each novel in an R lazy-load database: a length of 4 bytes, then a zlib stream, and so on."""
    while content:
        stream = zlib.decompressobj()
        yield character_vector(stream.decompress(content[4:]))
        content = stream.unused_data


def character_vector(content: bytes) -> list[str]:
    """Read R's binary format ("R Internals", 1.8): header, type, number of strings; each has flags and a length."""

    def number(at: int) -> int:
        return int.from_bytes(content[at : at + 4], "big", signed=True)

    start = 18 + number(14)  # "X\n", three versions, and the name of the encoding after its length
    if content[:2] != b"X\n" or number(2) != 3 or number(start) & 255 != CHARACTER_VECTOR:
        raise ValueError(
            f"not a character vector in R's format 3: {content[:18]!r}. Take another version of {PACKAGE}."
        )
    texts, at = [], start + 8
    for _ in range(number(start + 4)):
        end = at + 8 + number(at + 4)
        texts.append(content[at + 8 : end].decode("utf-8"))
        at = end
    return texts


def paragraphs_of(lines: list[str]) -> list[str]:
    """Join the wrapped lines of each paragraph; one with an indented line is verse and keeps them."""
    text = NOT_AUSTEN.sub("", "\n".join(line.rstrip() for line in lines).replace("_", "")).strip()
    paragraphs = []
    for paragraph in re.split(r"\n\n+", text):
        lines = [" ".join(line.split()) for line in paragraph.split("\n")]
        paragraphs.append(("\n" if re.search("^ ", paragraph, re.MULTILINE) else " ").join(lines))
    return list(filter(None, paragraphs))


def chapters_of(paragraphs: list[str]) -> list[str]:
    """Cut a novel before each chapter's heading; a title or a volume's heading before it belongs to the chapter."""
    chapters: list[list[str]] = [[]]
    has_heading = False
    for paragraph in paragraphs:
        if heading := HEADING.fullmatch(paragraph):
            if has_heading:
                chapters.append([])
            has_heading = heading["kind"].upper() == "CHAPTER"
        chapters[-1].append(paragraph)
    return ["\n\n".join(chapter) + "\n" for chapter in chapters]


def read_package(deb: Path | None) -> bytes:
    """Read the database in the package, which is downloaded unless it is given."""
    with tempfile.TemporaryDirectory() as folder:
        if deb is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
            [deb] = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(deb), f"{folder}/unpacked"], check=True, capture_output=True)
        return (Path(folder) / "unpacked" / TEXTS).read_bytes()


def main() -> int:
    """Write the chapters; print their number and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--deb", type=Path, help="the package, if it is here already")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists. Choose another folder or remove it.")
    try:
        content = read_package(args.deb)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode().strip() or str(error)
        parser.error(f"no package {PACKAGE}: {reason}. Download it on Debian or Ubuntu, and give it as --deb FILE.")
    for lines in novels_in(content):
        paragraphs = paragraphs_of(lines)
        if (title := paragraphs[0].upper()) not in NOVELS:
            parser.error(f"the package holds {title[:40]!r}, which is none of {', '.join(NOVELS)}.")
        chapters, novel = chapters_of(paragraphs), args.folder / title.lower().replace(" ", "-")
        novel.mkdir(parents=True)
        for number, chapter in enumerate(chapters, start=1):
            (novel / f"chapter-{number:02}.txt").write_text(chapter, encoding="utf-8")
        print(f"{novel}: {len(chapters)} chapters, {sum(len(c.encode()) for c in chapters):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
