"""Word lists, and the split of names and values into train, validation and test.

Every word is one token of the shipped tokenizer, and no word is in two lists, so a filler sentence can never be
mistaken for a statement. A name is a first and a second word, a value is a material and a mark; which split a name
or a value belongs to is decided by a hash of the whole pair, so that no test name or value occurs in training
although its single words do.
"""

import hashlib
from functools import cache

from cacheslide.errors import DataError

SPLITS = ("train", "validation", "test")

FIRST = tuple(
    """amber ashen bold brisk calm civil clear crisp dark dear deep dim dry eager early even faint fair fierce fine
    firm fleet fond frank free fresh gentle glad grand grave great keen kind lank late lean level light lone long loud
    loyal mellow mild neat noble odd pale plain prime proud quick quiet rare ready ripe sharp sleek sly smart solid
    stern stout swift""".split()
)

SECOND = tuple(
    """acorn adder alder aloe ant ape apple ash aspen aster auk badger balm barley basil bass bat bay bean bear beaver
    bee beech beet bison boar briar buck bull cactus calf camel carp cat cedar cherry chick clam clover cobra cod colt
    condor coot coral cow coyote crab crane cress crow cub curlew daisy deer dingo dog dove drake duck eagle eel egret
    elk elm emu fawn fern ferret fig finch fir flea flax fly foal fox frog gecko gnat goat goose gorse grape grouse
    grub gull hare hawk hazel hen heron hog holly hop horse hound hyena ibex ibis iris ivy jackal jay kale kelp kite
    kiwi koala lamb lark leek lemon lemur lily lime lion llama lotus lynx magpie mango maple mare marten melon mink
    mint mole moose moss moth mouse mule myrtle newt oak oat olive onion orchid oriole osprey otter owl ox palm panda
    parrot peach pear perch pigeon pine pike plum pony poppy puffin puma quail rabbit ram rat raven reed robin rook
    rose sage salmon seal shark sheep shrew shrimp skunk sloth snail""".split()
)

MATERIAL = tuple(
    """agate alloy basalt bone brass brick bronze canvas carbon chalk clay cobalt copper cotton enamel felt flint
    garnet glass gold granite ink iron ivory jade jet lace lead linen marble nickel onyx""".split()
)

MARK = tuple(
    """seven eight nine ten eleven twelve twenty thirty forty fifty sixty zero alpha beta gamma delta kappa sigma omega
    north south east west spring autumn monday friday sunday june july april march""".split()
)

FILLER = {
    "who": "clerk guard baker pilot writer farmer teacher doctor sailor judge painter driver porter miner".split(),
    "did": "opened closed painted moved cleaned sold bought found lost kept carried fixed drew left".split(),
    "how": "old new small large heavy narrow broken wooden empty busy round wet".split(),
    "what": "window door table road bridge wagon letter basket garden ladder engine market harbour kitchen".split(),
    "where": "near behind beside under above inside outside across".split(),
    "when": "yesterday today again often twice later once soon".split(),
}


def _bucket(text: str) -> str:
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return "test" if share == 9 else "validation" if share == 8 else "train"


@cache
def names(split: str) -> dict[str, tuple[str, ...]]:
    """Second word -> the first words it forms a name of this split with. Second words without any are left out."""
    check_split(split)
    found = {b: tuple(a for a in FIRST if _bucket(f"{a} {b}") == split) for b in SECOND}
    return {b: firsts for b, firsts in found.items() if firsts}


@cache
def values(split: str) -> tuple[tuple[str, str], ...]:
    """The (material, mark) pairs of a split."""
    check_split(split)
    return tuple((a, b) for a in MATERIAL for b in MARK if _bucket(f"{a} {b}") == split)


def check_split(split: str) -> None:
    """Raise a DataError unless `split` is one of the three."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
