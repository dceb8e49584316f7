import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.data.sources import split_of


def sides(documents, fraction=0.3, seed=0):
    return {document: split_of(document, validation_fraction=fraction, seed=seed) for document in documents}


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"))), st.lists(st.text(alphabet="abc")), st.randoms())
def test_a_document_keeps_its_side_when_the_corpus_is_reordered_or_grows(documents, more, chance):
    before = sides(documents)
    grown = documents + more
    chance.shuffle(grown)
    after = sides(grown)
    assert all(after[document] == side for document, side in before.items())


@given(st.text(alphabet=st.characters(codec="utf-8")), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_to_validation(document, a, b):
    small, large = sorted((a, b))
    if split_of(document, validation_fraction=small) == "validation":
        assert split_of(document, validation_fraction=large) == "validation"


def test_the_fraction_is_met_and_the_seed_changes_the_choice():
    documents = [f"document {index}" for index in range(4000)]
    first, second = sides(documents, 0.1), sides(documents, 0.1, seed=1)
    assert 0.08 < list(first.values()).count("validation") / 4000 < 0.12
    assert first != second


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_ends_put_everything_on_one_side(fraction):
    assert set(sides(map(str, range(50)), fraction).values()) == {"validation" if fraction else "train"}
