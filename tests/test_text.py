"""When two strings say the same thing, and the same text about other numbers."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.text import holds, normalise, parts, redraw, stands_verbatim

words = st.text(st.characters(categories=["L"], max_codepoint=0x17F), min_size=1, max_size=8)
numbers = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=2).map(str)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("€42 per Month", "€42 per month"),
        ("07:00–18:00", "07:00-18:00"),
        ("a — b", "a - b"),
        ("−5 °C", "-5 °C"),
        ("“it’s”", '"it\'s"'),
        ("**3 hours** of `training`", "3 hours of training"),
        ("three\u00a0 months\n\tlater ", "three months later"),
        ("48 hours.", "48 hours"),
        ("48 hours . ", "48 hours"),
        ("€ 42", "€ ４２"),  # full-width digits
        ("Cafe\u0301", "Café"),
    ],
)
def test_spellings_of_the_same_words_are_the_same(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), [("4.9", "49"), ("Pico 2", "Pico 2S"), ("-5", "5"), ("cafe", "café"), ("9.0", "9")])
def test_different_words_stay_different(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Tempo Team lists at $49 per seat per month.", "$49 per seat per month"),
        ("Tempo Team lists at $49 per seat per month.", "$49"),
        ("It costs $49.", "$49"),
        ("It costs $49, and no more", "$49"),
        ("up to 5 people", "5"),
        ("| Pico 2S | €42 per month |", "€42 per month"),
        ("The pump is set to **9.0 bar**.", "9.0 bar"),
        ("a rebate of 6 % when", "6 %"),
        ("from 07:00 to 18:00", "07:00"),
        ("In GREATER LISBON", "Greater Lisbon"),
        ("open on Monday\nto Saturday", "Monday to Saturday"),
        ("(a.b)*c stays", "(a.b)*c"),  # no regular expression
    ],
)
def test_a_text_holds_whole_words_and_whole_numbers(text, value):
    assert holds(text, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$49 per seat", "$4"),
        ("149 seats", "49"),
        ("$4.90 per seat", "$4"),
        ("4,900 seats", "4"),
        ("1,290 euro", "290"),
        ("9.05 bar", "05 bar"),
        ("the Pico 2S", "Pico 2"),
        ("a machine", "a mach"),
        ("everything", "thing"),
        ("aXb", "a.b"),
        ("anything", ""),
        ("anything", " . "),
        ("", "49"),
    ],
)
def test_a_text_does_not_hold_a_part_of_a_word_or_number(text, value):
    assert not holds(text, value)


@given(words, st.lists(words), st.lists(words))
def test_a_word_is_held_wherever_it_stands(word, before, after):
    assert holds(" ".join([*before, word, *after]), word)


@given(numbers, st.integers(0, 9), st.sampled_from(["{0}{1}", "{1}{0}", "{0}.{1}", "{1}.{0}", "{0},{1}", "{1},{0}"]))
def test_no_longer_number_holds_a_shorter_one(number, digit, form):
    assert holds(f"it is {number} now", number)
    assert not holds(f"it is {form.format(number, digit)} now", number)


@given(st.lists(st.text(st.characters(exclude_characters=";", categories=["L", "N", "S"]), min_size=1)))
def test_the_parts_of_joined_values_are_the_values(values):
    assert parts("; ".join(values)) == values
    assert parts("".join(f" {value} ;" for value in values)) == values


def test_an_answer_without_words_has_no_parts():
    assert parts("") == parts(" ") == parts(" ; ;") == []


def test_a_quote_stands_verbatim_whatever_its_white_space():
    text = "A loan machine\nis  free of charge, except that the café pays."
    assert stands_verbatim("loan machine is free of\tcharge,", text)
    assert stands_verbatim(" the café pays. ", text)


@pytest.mark.parametrize(
    "quote", ["loan machine is free of charge.", "A Loan machine", "machine free", "the cafe pays", "", " \n"]
)
def test_a_quote_with_another_word_letter_or_sign_does_not_stand(quote):
    assert not stands_verbatim(quote, "A loan machine\nis  free of charge, except that the café pays.")


@given(st.text(), st.text(), st.text())
def test_every_stretch_of_a_text_stands_in_it(before, quote, after):
    assert stands_verbatim(quote, f"{before} {quote} {after}") == bool(quote.split())


def test_numbers_are_drawn_anew_everywhere_at_once_and_dates_stay():
    text = "It costs €1,180 per day, not €180, from 2026-03-01, for 1 day."
    change = redraw(["€1,180 per day", "2026-03-01", "1 day"], [text], random.Random(0))
    drawn = change("1,180")
    assert drawn != "1,180" and len(drawn) == 5 and drawn.endswith("0")
    assert change(text) == text.replace("1,180", drawn)


@given(st.lists(st.integers(2, 10**6), min_size=1, max_size=6), st.integers())
def test_redrawn_numbers_stay_apart_from_each_other_and_from_the_rest(numbers, seed):
    values = [f"{number:,}" for number in numbers]
    text = "; ".join([*values, "7,777 others"])
    changed = redraw(values, [text], random.Random(seed))(text).split("; ")
    assert len(set(changed)) == len({*values, "7,777 others"}) and changed[-1] == "7,777 others"
