"""tools/austen.py: R's database of lines becomes a text file per chapter."""

import importlib.util
import sys
import zlib
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "austen.py"


@pytest.fixture
def austen():
    spec = importlib.util.spec_from_file_location("austen", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def database(*novels: list[str]) -> bytes:
    """Write novels as R's lazy-load database does (format 3, character vectors)."""
    content = b""
    for lines in novels:
        vector = b"X\n" + b"\0\0\0\3" + bytes(8) + b"\0\0\0\5UTF-8" + b"\0\0\0\x10" + len(lines).to_bytes(4, "big")
        for line in map(str.encode, lines):
            vector += b"\0\4\0\t" + len(line).to_bytes(4, "big") + line
        content += len(vector).to_bytes(4, "big") + zlib.compress(vector)
    return content


EMMA = [
    *["EMMA", "", "VOLUME I", "", "CHAPTER I", "", "Emma _was_", "rich,  £30.", "", "   Verse one", "   Verse two", ""],
    *["VOLUME II", "", "CHAPTER I", "", "The end came.", "", "FINIS"],
]


def test_lines_are_joined_and_verse_keeps_its_lines_and_chapters_begin_at_their_volume(austen):
    [lines] = austen.novels_in(database(EMMA))
    assert lines == EMMA
    first, second = austen.chapters_of(austen.paragraphs_of(lines))
    assert first == "EMMA\n\nVOLUME I\n\nCHAPTER I\n\nEmma was rich, £30.\n\nVerse one\nVerse two\n"
    assert second == "VOLUME II\n\nCHAPTER I\n\nThe end came.\n"


def test_a_file_is_written_for_each_chapter(austen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(austen, "read_package", lambda deb: database(EMMA, ["Persuasion", "", "Chapter 1", "", "Sir."]))
    monkeypatch.setattr(sys, "argv", ["austen.py", str(tmp_path / "out")])
    assert austen.main() == 0
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.txt"))
    assert files == ["emma/chapter-01.txt", "emma/chapter-02.txt", "persuasion/chapter-01.txt"]
    assert "emma: 2 chapters" in capsys.readouterr().out


def test_a_missing_package_and_an_unknown_text_are_one_line(austen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["austen.py", str(tmp_path / "out"), "--deb", str(tmp_path / "none.deb")])
    with pytest.raises(SystemExit) as stopped:
        austen.main()
    assert stopped.value.code == 2
    assert "give it as --deb FILE" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(austen, "read_package", lambda deb: database(["Ulysses", "", "Stately."]))
    with pytest.raises(SystemExit):
        austen.main()
    assert "holds 'ULYSSES'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a character vector"):
        austen.character_vector(b"RDX3\n" + bytes(40))
