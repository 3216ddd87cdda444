"""The words of `predict(keep=...)`."""

from __future__ import annotations

import pytest
from keep_tools import ALL

from gpurho.errors import SettingsError
from gpurho.keep import Keep


def test_words_give_themselves_again():
    for words in (ALL, ["field"], "electrons", ["field", "histogram:2.5,250"], ["slices:z=0.5,x=0.25", "coarse:4"]):
        keep = Keep.of(words)
        assert Keep.of(keep.to_items()) == keep
    assert Keep.of(None) == Keep.of("field") == Keep()
    assert Keep.of("coarse:3").tile_shape() == (63, 63, 63)
    assert Keep.of(["slice:z=0.5", "slice:c=0.5"]).slices == ((2, 0.5),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("coarse", "blocks of 1 to 64"),
        ("coarse:0", "blocks of 1 to 64"),
        ("coarse:4x4", "blocks of 1 to 64"),
        (["coarse:2", "coarse:4"], "coarse twice"),
        ("slice:z", "a fraction of it"),
        ("slice:w=0.5", "a fraction of it"),
        ("slice:z=1.5", "a fraction of it"),
        ("slice:z=nan", "a fraction of it"),
        ("atoms:3", "not known"),
        ("everything", "not known"),
        ("histogram:-1", "upper end"),
        ("histogram:1,0", "upper end"),
        ([], "empty"),
        ([3], "is a int"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(SettingsError, match=message):
        Keep.of(words)
