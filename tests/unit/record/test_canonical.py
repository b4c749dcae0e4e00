"""Canonical JSON, strict reading, exact floats and words."""

from __future__ import annotations

import json
import math
import struct

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.canonical import (
    dumps,
    from_hex_float,
    from_hex_word,
    hex_float,
    hex_word,
    is_unknown,
    loads,
    loads_canonical,
    sha256_hex,
    unknown,
)

TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=6) | st.floats(-1e20, 1e20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def test_the_example_of_rfc_8785() -> None:
    """Section 3.2.2 to 3.2.4 of the RFC: its input, and its bytes."""
    text = (
        '{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],'
        '"string": "\\u20ac$\\u000F\\u000aA\'\\u0042\\u0022\\u005c\\\\\\"\\/","literals": [null, true, false]}'
    )
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert dumps(json.loads(text)) == expected.encode()


def test_sha256_of_nothing_is_the_known_one() -> None:
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_what_is_written_is_read_back(tree: object) -> None:
    data = dumps(tree)
    assert json.loads(data, parse_int=float) == tree  # an independent reader; numbers are doubles
    assert loads_canonical(data, what="it") == tree


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1,"a":2}', "it: key 'a' stands twice in one object"),
        (b'{"b":{"a":1,"a":1}}', "it: key 'a' stands twice in one object"),
        (b"NaN", "it: NaN is not JSON"),
        (b"[-Infinity]", "it: -Infinity is not JSON"),
        (b"1e999", "it: number 1e999 is not finite"),
        (b"9007199254740993", "it: integer 9007199254740993 is beyond 2^53 - 1"),
        (b"-9007199254740993", "it: integer -9007199254740993 is beyond 2^53 - 1"),
        (b"18446744073709551615", "it: integer 18446744073709551615 is beyond 2^53 - 1"),
        (b"1" * 5000, "it: integer 111111111111111111111111 is beyond 2^53 - 1"),
        (b'"\xff"', "it: is not UTF-8 at byte 1"),
        (b"{} {}", "it: is not JSON: Extra data (line 1, column 4)"),
        (b"", "it: is not JSON: Expecting value (line 1, column 1)"),
        (b"[" * 65 + b"]" * 65, "it: is nested deeper than 64 levels"),
        (b"[" * 200_000, "it: is nested deeper than 64 levels"),
    ],
)
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        loads(data, what="it")
    assert str(caught.value) == message


def test_the_limits_themselves_pass() -> None:
    assert loads(b"9007199254740991", what="it") == 2**53 - 1
    assert loads(b"9007199254740992", what="it") == 2.0**53  # as a double of that size is written
    assert loads(dumps(1e20), what="it") == 1e20
    assert loads(b"[" * 64 + b"]" * 64, what="it")
    with pytest.raises(InputError, match="it: has 5 bytes, more than the 4 that are read"):
        loads(b"[1,2]", what="it", max_bytes=4)


@pytest.mark.parametrize("data", [b'{"b":1,"a":2}', b"[1, 2]", b"1.0", b"-0", b"[1]\n", b'"\\u0041"', b'"\\ud800"'])
def test_what_is_not_canonical_is_refused(data: bytes) -> None:
    loads(data, what="it")
    with pytest.raises(InputError, match=r"^it: "):
        loads_canonical(data, what="it")


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, {1: 2}, object(), "\ud800", b"bytes"])
def test_what_json_cannot_hold_is_our_own_fault(value: object) -> None:
    with pytest.raises(ApertusError, match="cannot be written as canonical JSON") as caught:
        dumps({"a": value})
    assert caught.value.exit_code == 4


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_floats_keep_every_bit(word: int) -> None:
    value = struct.unpack("<d", struct.pack("<Q", word))[0]
    again = from_hex_float(hex_float(value))
    assert (math.isnan(value) and math.isnan(again)) or struct.pack("<d", again) == struct.pack("<d", value)
    assert from_hex_word(hex_word(word)) == word


@pytest.mark.parametrize(
    "text", ["1.5", "0x1.8p+1", "0X1.8000000000000p+1", " 0x0.0p+0", "infinity", "NaN", "", "0x1p9999"]
)
def test_other_spellings_of_floats_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^loss: "):
        from_hex_float(text, what="loss")


@pytest.mark.parametrize("text", ["", "0" * 15, "0" * 17, "A" * 16, "0" * 16 + "\n", 5, None])
def test_other_spellings_of_words_are_refused(text: object) -> None:
    with pytest.raises(InputError, match="is not 16 lower-case hex digits"):
        from_hex_word(text)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_words_have_64_bits(value: int) -> None:
    with pytest.raises(ApertusError, match="is not an unsigned 64-bit integer"):
        hex_word(value)


def test_unknown_is_recognised() -> None:
    assert is_unknown(unknown("no git"))
    assert not is_unknown({"unknown": "a", "b": 1})
    assert not is_unknown("unknown")


@given(
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), st.floats(allow_nan=False), st.text()
        ),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ).filter(lambda value: "inf" not in repr(value)),
    st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_the_quick_check_of_the_form_is_that_of_rfc8785(value: object, number: int) -> None:
    """What is canonical is read; a byte more, or less, or another, is read only if that is canonical too."""
    data = rfc8785.dumps(value)
    assert rfc8785.dumps(loads_canonical(data, what="it")) == data
    at = number % (len(data) + 1)
    near = (data[:at] + data[at + 1 :], data[:at] + b" " + data[at:], data[:at] + b"0" + data[at:])
    for other in (*near, data.replace(b"e-", b"e-0"), data.replace(b".", b".0"), data.replace(b"\\", b"\\u005c")):
        try:
            read = loads_canonical(other, what="it")
        except InputError:
            continue
        assert rfc8785.dumps(read) == other
