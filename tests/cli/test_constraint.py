"""The flags of constraints: a schema comes from a file or as it is."""

import re

import pytest

from redraft.cli.constraint import ConstraintArguments
from redraft.constraints.kinds import JsonSchema
from redraft.constraints.schema import MAX_CHARACTERS


def test_a_schema_is_read_from_its_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"const": "é"}', encoding="utf-8")
    assert ConstraintArguments(json_schema=str(path)).constraint().parts == (JsonSchema('{"const": "é"}'),)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("false", "no value fits the schema"),
        (" []\n", "a schema must be an object or a boolean; got []"),
        ("null", "a schema must be an object or a boolean; got None"),
        ("5", "a schema must be an object or a boolean; got 5"),
        ('"string"', "a schema must be an object or a boolean; got 'string'"),
        ("NaN", "the JSON schema is not JSON"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ('{"type": ', "the JSON schema is not JSON"),
    ],
)
def test_json_is_a_schema_and_no_name_of_a_file_and_is_refused_for_what_it_is(given, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        ConstraintArguments(json_schema=given).constraint().automaton()


@pytest.mark.parametrize("name", ["true.json", "[a].json", "5.json"])
def test_a_file_whose_name_begins_like_json_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('{"type": "null"}', encoding="utf-8")
    assert ConstraintArguments(json_schema=name).constraint().parts == (JsonSchema('{"type": "null"}'),)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("latin.json", "it names no text file in UTF-8"),
        (".", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("a\0", "UTF-8"),
    ],
)
def test_a_schema_file_that_cannot_be_read_ends_in_one_line(tmp_path, name, reason):
    (tmp_path / "latin.json").write_bytes(b'{"const": "\xe9"}')
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        ConstraintArguments(json_schema=str(tmp_path / name)).constraint()
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


def test_a_file_without_end_is_not_read_to_it():
    constraint = ConstraintArguments(json_schema="/dev/zero").constraint()
    with pytest.raises(ValueError, match=f"it has more than {MAX_CHARACTERS} characters"):
        constraint.automaton()
