"""The offline teacher's table of exercise families: what one step does, in words and in Python.

A family takes a value of one kind and gives a value of another; two families compose where the kinds
meet. Its phrase states every constant that its code needs. In the code, {v} is the value worked on and
{a}, {b} are constants. `setup` lines, where a family has them, run before `expression` is evaluated.
"""

import dataclasses

KINDS = ("ints", "int", "text", "words", "table", "bool")
"""list[int], int, str, list[str], dict[str, int], bool (which no family takes)."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One step. `constants` names the domain of {a} and of {b}: see `teacher.draw_constant`."""

    name: str
    takes: str
    gives: str
    verb: str
    phrases: tuple[str, ...]
    expression: str
    constants: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


def _family(
    name: str, kinds: str, verb: str, phrases: str, expression: str, constants: str = "", setup: str = ""
) -> Family:
    takes, gives = kinds.split(" -> ")
    return Family(
        name, takes, gives, verb, tuple(phrases.split(" | ")), expression, tuple(constants.split()),
        tuple(setup.splitlines()),
    )  # fmt: skip


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FAMILIES: tuple[Family, ...] = (
    # Lists of integers: filters
    _family("keep_above", "ints -> ints", "keep",
            "keep the numbers greater than {a} | drop the numbers that are not greater than {a}",
            "[x for x in {v} if x > {a}]", "number"),
    _family("keep_below", "ints -> ints", "keep",
            "keep the numbers less than {a} | drop the numbers that are not less than {a}",
            "[x for x in {v} if x < {a}]", "number"),
    _family("drop_equal", "ints -> ints", "remove",
            "remove every {a} | leave out the numbers equal to {a}",
            "[x for x in {v} if x != {a}]", "number"),
    _family("keep_even", "ints -> ints", "pick",
            "keep the even numbers | drop the odd numbers", "[x for x in {v} if x % 2 == 0]"),
    # Lists of integers: maps
    _family("add", "ints -> ints", "raise",
            "add {a} to each number | increase each number by {a}", "[x + {a} for x in {v}]", "number"),
    _family("multiply", "ints -> ints", "scale",
            "multiply each number by {a} | scale each number by {a}", "[x * {a} for x in {v}]", "number"),
    _family("square", "ints -> ints", "square",
            "square each number | replace each number by its square", "[x * x for x in {v}]"),
    _family("negate", "ints -> ints", "flip",
            "negate each number | flip the sign of each number", "[-x for x in {v}]"),
    _family("cap", "ints -> ints", "cap",
            "cap each number at {a} | limit each number to at most {a}", "[min(x, {a}) for x in {v}]", "number"),
    _family("replace_number", "ints -> ints", "swap",
            "replace every {a} by {b} | change each {a} into {b}",
            "[{b} if x == {a} else x for x in {v}]", "number number"),
    # Lists of integers: order and shape
    _family("sort", "ints -> ints", "sort",
            "sort the numbers | put the numbers in increasing order", "sorted({v})"),
    _family("reverse", "ints -> ints", "reverse",
            "reverse the numbers | put the numbers in reverse order", "{v}[::-1]"),
    _family("distinct", "ints -> ints", "clean",
            "drop repeated numbers | keep the first of each distinct number", "list(dict.fromkeys({v}))"),
    _family("first", "ints -> ints", "take",
            "take the first {a} numbers | keep only the first {a} numbers", "{v}[:{a}]", "count"),
    _family("last", "ints -> ints", "take",
            "take the last {a} numbers | keep only the last {a} numbers", "{v}[-{a}:]", "count"),
    _family("append", "ints -> ints", "extend",
            "append {a} | add {a} at the end", "{v} + [{a}]", "number"),
    _family("running_totals", "ints -> ints", "accumulate",
            "take the running totals | replace each number by the sum so far", "totals", "",
            "total = 0\ntotals = []\nfor x in {v}:\n    total += x\n    totals.append(total)"),
    # Lists of integers: reductions
    _family("total", "ints -> int", "sum",
            "return the sum | add up the numbers", "sum({v})"),
    _family("largest", "ints -> int", "find",
            "return the largest number, or {a} if there is none | find the maximum, {a} if empty",
            "max({v}, default={a})", "number"),
    _family("count_above", "ints -> int", "count",
            "count the numbers greater than {a} | return how many numbers are greater than {a}",
            "sum(x > {a} for x in {v})", "number"),
    _family("count_equal", "ints -> int", "count",
            "count how often {a} occurs | return the number of times that {a} occurs",
            "{v}.count({a})", "number"),
    _family("how_many", "ints -> int", "count",
            "return how many numbers there are | count the numbers", "len({v})"),
    _family("product", "ints -> int", "multiply",
            "return the product | multiply the numbers together", "product", "",
            "product = 1\nfor x in {v}:\n    product *= x"),
    _family("any_above", "ints -> bool", "check",
            "check if any number is greater than {a} | return whether some number is greater than {a}",
            "any(x > {a} for x in {v})", "number"),
    _family("has", "ints -> bool", "check",
            "check if {a} occurs | return whether {a} is among the numbers", "{a} in {v}", "number"),
    _family("to_strings", "ints -> words", "show",
            "turn each number into a string | convert the numbers to strings", "[str(x) for x in {v}]"),
    # Integers
    _family("increase", "int -> int", "increase",
            "add {a} | increase it by {a}", "{v} + {a}", "number"),
    _family("times", "int -> int", "multiply",
            "multiply it by {a} | return it times {a}", "{v} * {a}", "number"),
    _family("modulo", "int -> int", "reduce",
            "take it modulo {a} | return its remainder modulo {a}", "{v} % {a}", "number"),
    _family("at_most", "int -> int", "limit",
            "limit it to at most {a} | return the smaller of it and {a}", "min({v}, {a})", "number"),
    _family("exceeds", "int -> bool", "check",
            "check if it is greater than {a} | return whether it is greater than {a}", "{v} > {a}", "number"),
    _family("multiples", "int -> ints", "list",
            "list its first {a} multiples | return its first {a} multiples",
            "[{v} * x for x in range(1, {a} + 1)]", "count"),
    # Strings
    _family("upper", "text -> text", "shout",
            "make it upper case | convert it to upper case", "{v}.upper()"),
    _family("backwards", "text -> text", "reverse",
            "reverse it | write it backwards", "{v}[::-1]"),
    _family("prefix", "text -> text", "prefix",
            "put {a} in front | add {a} at the start", "{a} + {v}", "word"),
    _family("suffix", "text -> text", "suffix",
            "append {a} | add {a} at the end", "{v} + {a}", "word"),
    _family("erase", "text -> text", "erase",
            "remove every {a} | erase each {a}", "{v}.replace({a}, '')", "word"),
    _family("replace_text", "text -> text", "replace",
            "replace every {a} by {b} | change each {a} into {b}", "{v}.replace({a}, {b})", "word word"),
    _family("repeat", "text -> text", "repeat",
            "repeat it {a} times | return {a} copies of it in a row", "{v} * {a}", "count"),
    _family("head", "text -> text", "trim",
            "take the first {a} characters | keep only the first {a} characters", "{v}[:{a}]", "count"),
    _family("text_length", "text -> int", "measure",
            "return its length | count its characters", "len({v})"),
    _family("count_text", "text -> int", "count",
            "count how often {a} occurs | return the number of times that {a} occurs", "{v}.count({a})", "word"),
    _family("starts", "text -> bool", "check",
            "check if it starts with {a} | return whether it begins with {a}", "{v}.startswith({a})", "word"),
    _family("split_words", "text -> words", "split",
            "split it into words | return its words as a list", "{v}.split()"),
    # Lists of strings
    _family("starting", "words -> words", "keep",
            "keep the words that start with {a} | drop the words that do not start with {a}",
            "[w for w in {v} if w.startswith({a})]", "word"),
    _family("containing", "words -> words", "select",
            "keep the words that contain {a} | select the words with {a} in them",
            "[w for w in {v} if {a} in w]", "word"),
    _family("without", "words -> words", "remove",
            "remove the word {a} | leave out the words equal to {a}", "[w for w in {v} if w != {a}]", "word"),
    _family("longer", "words -> words", "keep",
            "keep the words longer than {a} characters | keep the words with more than {a} characters",
            "[w for w in {v} if len(w) > {a}]", "count"),
    _family("upper_each", "words -> words", "shout",
            "make each word upper case | convert the words to upper case", "[w.upper() for w in {v}]"),
    _family("suffix_each", "words -> words", "suffix",
            "append {a} to each word | end each word with {a}", "[w + {a} for w in {v}]", "word"),
    _family("sort_words", "words -> words", "sort",
            "sort the words | put the words in alphabetical order", "sorted({v})"),
    _family("join", "words -> text", "join",
            "join the words with {a} | glue the words together with {a}", "{a}.join({v})", "word"),
    _family("word_count", "words -> int", "count",
            "return how many words there are | count the words", "len({v})"),
    _family("lengths", "words -> ints", "measure",
            "return the length of each word | list the lengths of the words", "[len(w) for w in {v}]"),
    _family("length_table", "words -> table", "map",
            "map each word to its length | make a dict from word to length", "{{w: len(w) for w in {v}}}"),
    # Dicts
    _family("table_above", "table -> table", "keep",
            "keep the entries with values greater than {a} | drop entries whose value is not greater than {a}",
            "{{k: n for k, n in {v}.items() if n > {a}}}", "number"),
    _family("drop_key", "table -> table", "remove",
            "remove the key {a} | leave out the entry {a}", "{{k: n for k, n in {v}.items() if k != {a}}}", "word"),
    _family("values", "table -> ints", "list",
            "return the values as a list | list the values", "list({v}.values())"),
    _family("keys", "table -> words", "list",
            "return the keys in order | list the sorted keys", "sorted({v})"),
    _family("look_up", "table -> int", "get",
            "return the value of {a}, or {b} if missing | look up {a}, with {b} if missing",
            "{v}.get({a}, {b})", "word number"),
)  # fmt: skip

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ints": ("values", "numbers", "nums", "scores", "readings", "prices", "ages", "points"),
    "int": ("number", "value", "amount", "n", "score", "level", "price", "age"),
    "text": ("text", "s", "string", "line", "name", "label", "title", "phrase"),
    "words": ("words", "names", "strings", "labels", "tags", "lines", "tokens", "items"),
    "table": ("table", "d", "mapping", "scores", "stock", "prices", "ages", "votes"),
}
"""Argument names by kind. They are shared by training and held-out exercises."""

ADJECTIVES: tuple[str, ...] = _split(
    "able amber basic big blue bold brief bright broad calm clean clear close cold cool daily deep dry early east "
    "easy even extra fair fast final fine first flat fresh full good grand gray great green half happy hard high "
    "hot inner known large late lazy left light local long lost loud low lucky main major minor mixed model near "
    "neat new next nice noisy north odd old open outer past plain poor prime proud pure quick quiet rare raw ready "
    "real red rich right rough round safe sharp short silent simple single slow small smart smooth soft solid south "
    "square steady still strong sunny super sweet tall thin tiny total true upper useful vast warm weak west white "
    "wide wild wise young"
)

NOUNS: tuple[str, ...] = _split(
    "apples arrows badges bands barrels baskets beacons beads bells bills birds blocks boards boats bones books "
    "boxes branches bricks bridges buckets buttons cables cakes camps cards carts cases cells chains chairs charts "
    "chips circles clients clouds coins crates cups curves deals desks dishes doors dots drums engines events farms "
    "fences films flags flames flights floors flowers forms forts frames games gardens gates gears gems gifts goals "
    "grains grids groups guests hands hills homes hooks horses hours houses islands jars jobs jumps kites knots "
    "lakes lamps leaves letters lists loads locks logs loops maps masks meals metals miles mills mines moons motors "
    "nests nodes notes oceans offers orders owls pages paints pairs papers parks paths pearls pens phones photos "
    "pilots pipes planes plans plants plates ports posts pots pumps queues races rails ranks rates records rings "
    "rivers roads robots rocks rooms roots ropes routes rows rules sails scales scenes seats seeds shapes shells "
    "ships shops signs slots songs spots stages stairs stamps stars steps stones stores storms streams streets "
    "tables tasks teams tests tickets tides tiles tools towers towns toys tracks trails trains trees trips trucks "
    "tubes tunes units vans views walls waves wells wheels winds windows wings wires woods yards zones"
)
