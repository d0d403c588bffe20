"""Numbers of records to six significant digits."""

from harness.results.rounding import rounded


def test_floats_are_rounded_wherever_they_stand_and_nothing_else():
    value = {
        "a": 1 / 3,
        "b": [2e-9 / 3, (1234567.8, 12345678)],
        "c": "0.123456789",
        "d": None,
        "e": True,
        "f": 1e300 / 3,
    }
    assert rounded(value) == {
        "a": 0.333333,
        "b": [6.66667e-10, [1234570.0, 12345678]],
        "c": "0.123456789",
        "d": None,
        "e": True,
        "f": 3.33333e299,
    }
    assert rounded(rounded(value)) == rounded(value)
