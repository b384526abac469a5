"""Do two LaTeX answers mean the same?

A module for the sandbox: verify/pool.py has it imported there and nowhere else, since it puts forty
regular expressions, a LaTeX parser and sympy to hostile text, and only a process can be killed.

Owns: equality of mathematical answers. plain() rewrites both in one form, RULES decide exactly what
they can (rationals, units, choices, sets, intervals, equations), and math-verify has the last word
on formulas.
Refuses to know: where the answer stood in the response, rewards, time limits.
Left out on purpose: tolerance. 0.333 is not 1/3, 10001 is not 10000, 50 is not 0.5, 5 cm is not
5 m.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import sympy
from math_verify import LatexExtractionConfig, parse, verify

# Of an answer that a parser may see
MAX_ANSWER = 1000  # characters
MAX_DEPTH = 20  # nested brackets
MAX_WORDS = 8  # of an answer that is text; nobody finds the words of a longer one

# ---------------------------------------------------------------------------------- one form: plain


def first_of_line(table: str) -> dict[str, str]:
    """Every word of a table -> the first word of its line."""
    return {word: line.split()[0] for line in table.strip().splitlines() for word in line.split()}


SIGNS = str.maketrans(  # Unicode that answers are full of
    "\u00a0\u2009\u202f−–÷⁄，：（）＝′",  # no-break space, thin space, narrow no-break space
    "   --//,:()='",
    "\u200b\u2060\ufeff",  # away with: zero-width space, word joiner, byte-order mark
)
WITHOUT_MEANING = """
left right middle big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits rm bf it
large Large checkmark
""".split()
MEANING = first_of_line(r"""
\cdot × · ⋅ times ast
\infty ∞
\le ≤ leq leqslant
\ge ≥ geq geqslant
\ne ≠ neq
\pm ±
\mp ∓
\pi π
\cup ∪
\cap ∩
\in ∈
\emptyset ∅ varnothing
\euro €
\pounds £
\alpha α
\beta β
\theta θ
\lambda λ
\phi φ
\setminus ∖ backslash
\ldots dots cdots
^\circ ° degree
\mathbb{R} ℝ
\mathbb{Z} ℤ
\frac{1}{2} ½
\frac{1}{3} ⅓
\frac{2}{3} ⅔
\frac{1}{4} ¼
\frac{3}{4} ¾
\{ lbrace
\} rbrace
| lvert rvert vert
< lt
> gt
: colon
""")
COMMANDS = dict.fromkeys(WITHOUT_MEANING, "") | dict.fromkeys(("quad", "qquad"), " ")
for name, sign in MEANING.items():  # one sign for its many names; letters may follow a command
    COMMANDS[name] = f"{sign} " if sign[-1].isalpha() else sign
SIGNS |= {ord(name): sign for name, sign in COMMANDS.items() if len(name) == 1}
FONTS = (
    "text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname"
    "|boldsymbol|emph|underline"
)
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp "
    "max min gcd lcm det mod".split()
)
SPACE = "\1"  # one that stays


def plain_font(m: re.Match) -> str:
    """Fonts do not matter: what is not a word is itself, words stay together as \text{words}."""
    words = SPACE.join(m[1].split())
    if words.lower() in ("and", "or", ","):
        return ";"
    if not re.search(r"[A-Za-z]{2}", words):
        return f" {words}" if len(words) == 1 else words
    if words in FUNCTIONS:
        return f"\\{words} "
    measured = re.fullmatch(r"(-?\d[\d.,/]*)\1?([A-Za-z].*)", words)  # \text{5cm}
    if measured:
        return rf"{measured[1]}\text{{{measured[2]}}}"
    return rf"\text{{{words}}}"


REWRITES = [  # in this order
    (r"√\s*(\d+|[a-zA-Z]|\([^()]*\))", r"\\sqrt{\1}"),
    (r"([⁰¹²³⁴-⁹]+)", r"^{\1}"),
    (r"([₀-₉]+)", r"_{\1}"),
    (r"[⁰¹²³⁴-⁹₀-₉]", lambda small: str(unicodedata.digit(small[0]))),
    (r"(?<=\d)(?:\\[,! ]|\{,\}|~|\\!,|,\\!)(?=\d{3}(?!\d))", ","),  # 1{,}000
    (r"\\[()\[\]]|(?<!\\)\$", ""),
    (r"(?<!\\)\\[,;:! ]|~|\\hspace\{[^{}]*\}|\\\\\s*$", " "),
    (r"\\([a-zA-Z]+)", lambda command: COMMANDS.get(command[1], command[0])),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\begin\{(?:[bp]|small)?matrix\}|\\begin\{array\}\{[^{}]*\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:[bp]?matrix|smallmatrix|array)\}", r"\\end{pmatrix}"),
    (
        r"\\begin\{(cases|aligned)\}(.*?)\\end\{\1\}",
        lambda rows: rows[2].replace(r"\\", ";").replace("&", ""),
    ),
    (
        r"\{([^{}]+)\\choose\s*([^{}]+)\}|\bC_\{?(\d+)\}?\^\{?(\d+)\}?",
        r"\\binom{\1\3}{\2\4}",
    ),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])", r"^\\circ "),
    (r"\\%", "%"),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (rf"\\(?:{FONTS})\s*\{{([^{{}}]*)\}}", plain_font),
    (r"\\f?box(?:ed)?\s*\{([^{}]*)\}", r"\1"),
    # 100, 200 is a list, 100,200 is a number
    (r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|,\s+", ";"),
    (r"(?<=\d)\s+([mgshLNJWV])$", r"\\text{\1}"),  # 5 m is five meters, 5m is five times m
    (r"(\d)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),  # 2 1/2
    (r"\\log_(\w)\s*(\w+)", r"\\log_{\1}{\2}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"^\d{1,3}(?: \d{3})+$", lambda spaced: spaced[0].replace(" ", "")),
    (r"(?<=\d)\s+(?=\d)", "␣"),  # 3 5 is not 35, nor anything else
    (r"\\(frac|sqrt|sqrt\[\w+\])\s*(\w)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", rf"\1{SPACE}"),
    (r"\s+", ""),
    (f"[\0{SPACE}]", " "),  # from here on \0 is in no answer
    (r"\+\\infty", r"\\infty"),
    (r"^([^<>]+)>([^<>]+)>([^<>]+)$", r"\3<\2<\1"),
    (r"[.,;:]+$", ""),
]


def plain(latex: str) -> str:
    """LaTeX without what does not change its meaning: fonts, spaces, sizes, the many names of the
    same sign."""
    latex = latex.translate(SIGNS)
    for pattern, to in REWRITES:
        latex = re.sub(pattern, to, latex.strip(" \n"))
    while latex[:1] in ("{", "(") and one_bracket(latex):
        if latex[0] == "(" and re.search("[,;]|^.[A-J].$", latex):  # a point, or choice (B)
            break
        latex = latex[1:-1]
    return latex


# ------------------------------------------------------------------------------ brackets and lists

STEPS = dict.fromkeys("({[", 1) | dict.fromkeys(")}]", -1)


def depths(s: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(accumulate(STEPS.get(character, 0) for character in s))


def one_bracket(s: str) -> bool:
    """Does the bracket that opens `s` close at its end?"""
    return [*depths(s), 0].index(0) == len(s) - 1


def split(s: str, separator: str) -> list[str]:
    """`s` at the separators (a regular expression) that are inside no bracket."""
    depth = depths(s)
    marked = re.sub(separator, lambda found: found[0] if depth[found.start()] else "\0", s)
    return marked.split("\0")


class Listed(NamedTuple):
    """("[)", ["0", "1"]) for [0,1), ("{}", ["1", "2"]) for the set \\{1,2\\}."""

    kind: str  # its brackets; "" for a bare list
    members: list[str]


def bracketed(s: str) -> Listed | None:
    """None when no bracket holds all of `s`."""
    inner = re.sub(r"^\\\{", "{", s)
    if inner[:1] not in ("(", "[", "{") or not one_bracket(inner):
        return None
    return Listed(inner[0] + inner[-1], members(inner[1:-1].removesuffix("\\")))


def members(s: str) -> list[str]:
    """The members of a list: 1,2 and \\pm 3 (two of them) and (x,y)=(1,2) (x=1,y=2)."""
    found = []
    parts = [part for part in split(s, r";|,(?!\d{3}(?!\d))") if part]
    for part in parts:
        pairs = named_members(part)
        if pairs:
            found += pairs if len(parts) == 1 else split(part, "=")[1:]
        elif r"\pm" in part:
            plus = re.sub(r"(?<=[^=(])\\pm ?", "+", part)
            found += [re.sub(r"\\pm ?", "", plus), re.sub(r"\\pm ?", "-", part)]
        else:
            found.append(part)
    return found


def named_members(s: str) -> list[str]:
    """["x=1", "y=2"] of (x,y)=(1,2), else nothing."""
    sides = [bracketed(side) for side in split(s, "=")]
    if len(sides) == 2 and all(sides):
        names, values = (side.members for side in sides)
        if len(names) == len(values):
            return [f"{name}={value}" for name, value in zip(names, values)]
    return []


def listed(s: str) -> Listed:
    """A set, or more than one thing in brackets or without."""
    held = bracketed(s)
    if held and (held.kind == "{}" or len(held.members) > 1):
        return held
    return Listed("", members(s))


def in_any_order(golds: list[str], answers: list[str]) -> bool:
    if len(golds) != len(answers):
        return False
    left = list(answers)
    for gold in sorted(golds, key=lambda gold: gold not in answers):  # the identical cost nothing
        found = gold
        if gold not in left:
            found = next((answer for answer in left if same(gold, answer)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def in_their_order(golds: list[str], answers: list[str]) -> bool:
    return len(golds) == len(answers) and all(map(same, golds, answers))


# ----------------------------------------------------------------------------------------- numbers

DECIMAL = re.compile(  # 1,000.5 or 0.3\overline{6}
    r"(?=.*\d)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*)(?:\\(?:overline|dot|bar)\{?(\d+)\}?)?)?", re.A
)
SCIENTIFIC = re.compile(r"(?:([^-+].*)(?:\\cdot ?10\^|[eE]\+?)|10\^)\{?(-?\d{1,3})\}?", re.A)
FRACTION = re.compile(r"(\d*)\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/]*)/([^/]*)", re.A)


def number(s: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed number or a x 10^b."""
    try:
        return exact(s)
    except (ValueError, ZeroDivisionError):
        return None


def exact(s: str) -> Fraction:
    """What number() answers; ValueError or ZeroDivisionError where it answers None."""
    if re.match(r"[-+][\d.\\(]", s):
        value = exact(s[1:])
        return -value if s[0] == "-" else value
    found = DECIMAL.fullmatch(s)
    if found:
        return decimal(*found.groups(""))
    found = SCIENTIFIC.fullmatch(s)
    if found:
        return exact(found[1] or "1") * Fraction(10) ** int(found[2])
    found = FRACTION.fullmatch(s)
    if found:
        whole, top, bottom, before_slash, after_slash = found.groups("")
        return int(whole or "0") + exact(top + before_slash) / exact(bottom + after_slash)
    if s[:1] == "(" and one_bracket(s):
        return exact(s[1:-1])
    raise ValueError


def decimal(whole: str, part: str, period: str) -> Fraction:
    """Of whole.part and digits that repeat for ever."""
    value = Fraction(int(whole.replace(",", "") + part or "0"), 10 ** len(part))
    if period:
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(part))
    return value


# ------------------------------------------------------------------------------------------- units

UNITS = first_of_line(r"""
cm centimeter centimetre
mm millimeter millimetre
km kilometer kilometre
m meter metre
inch inche in
foot feet ft
yard yd
mile mi
kg kilogram
g gram
mg milligram
lb
ounce oz
second sec s
minute min
hour hr h
day
week
month
year yr
L l liter litre
mL ml milliliter millilitre
gallon
dollar usd \$
cent
euro eur \euro
yuan rmb
ton
pound gbp \pounds
% percent
degree deg ^\circ
^\circC
^\circF
radian rad
newton N
joule J
watt W
volt V
hertz Hz
pascal Pa
unit
kmh
people
student
point
way
""")  # every name of a unit -> the first of its line
# without \text; the longest first
BARE = sorted((unit for unit in UNITS if len(unit) > 1 and unit.isalpha()), key=len, reverse=True)
UNIT = re.compile(
    rf"((?:\\text\{{[^{{}}]*\}}|(?<![a-zA-Z\\])(?:{'|'.join(BARE)})s?(?![a-zA-Z])"
    r"|%|\^\\circ ?[CF]?)(?:\^\{?[23]\}?)?[/.]?)+$"
)
NO_UNIT = re.compile(
    r"\b(?:or|maybe|perhaps|not|is|are|about|approximately|more|less|least|most|above|below|over"
    r"|under|so|but|and|also|hundred|thousand|million|billion|dozen|half|halves|third|squared|cubed"
    r"|factorial|pi|plus|minus|times|divided|base|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|\w+teen|\w+ty)\b|\(",
    re.I,
)


class Measure(NamedTuple):
    """("5", "cm") of 5\\text{ cm}; the unit is "" when there is none."""

    value: str
    unit: str


def measure(s: str) -> Measure:
    """What is measured, and in what."""
    currency = re.match(r"(-?)(\\\$|\\euro ?|\\pounds ?)(?=.)", s)
    if currency:
        return Measure(currency[1] + s[currency.end() :], UNITS[currency[2].strip()])
    found = UNIT.search(s)
    if (
        not found
        or not found.start()
        or s[found.start() - 1] in "^_=<>,(+-;"
        or NO_UNIT.search(found[0])
    ):
        return Measure(s, "")
    return Measure(re.sub(r"\^\\circ ?", "", s[: found.start()]), unit_name(found[0]))


def unit_name(words: str) -> str:
    """cm^2 of \\text{square centimeters}, km/h of \\text{kilometers per hour}."""
    name = re.sub(r"\\text\{([^{}]*)\}", r"\1", words).replace(" per ", "/").replace("mph", "mi/h")
    name = name.replace(" ", "").rstrip(".")
    name = re.sub(r"^(?:cubic|cu\.?)(.+)", r"\1^3", name)
    name = re.sub(r"^(?:square|sq\.?)(.+)", r"\1^2", name)
    if "circ" in name:
        return common_unit(name)
    parts = re.split(r"([/^])", re.sub(r"[{}]", "", name))
    return "".join(map(common_unit, parts))


def common_unit(word: str) -> str:
    for spelling in (word, word.lower(), word.lower().removesuffix("s")):
        if spelling in UNITS:
            return UNITS[spelling]
    return spelling


def measures(s: str) -> list[Measure] | None:
    """All parts of 2 hours 30 minutes; None when there is something else in it."""
    found = re.findall(r"([\d./]+)\\text\{([a-z]+?)s?\}", s)
    if "".join(rf"{count}\text{{{unit}}}" for count, unit in found) != s.replace("s}", "}"):
        return None
    return [Measure(count, UNITS.get(unit, unit)) for count, unit in found]


# ----------------------------------------------------------------------------------- names and text

NAME = (  # what an answer may be called: x, f(x), f^{-1}(x), a_n, \angle ABC, \text{area}, (x,y)
    r"\|?(?:\\(?:angle|triangle|overline|vec|measuredangle|mathcal)\s*)*"
    r"\{?(?:\\?[A-Za-z]+'*|\\text\{[^{}]*\})"
    r"(?:\^\{-1\})?(?:_\{?[\w\\{} ]+\}?)?(?:\([\w,;]*\))?\}?\|?|\([A-Za-z](?:[,;][A-Za-z])*\)"
)
WORDS = re.compile(r"\\text\{([^{}]*)\}|(?<![a-zA-Z\\_^])([a-zA-Z]{3,})")


class Choice(NamedTuple):
    """("B", "12") of (B) 12, ("B", "") of B or \\text{(B)}, ("AC", "") of (A) and (C)."""

    letters: str
    text: str


def choice(s: str) -> Choice | None:
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", s)
    letters = re.fullmatch(r"(?:\(?[A-J]\)?[.:)?]?|[\s;,&]|and|or)+", bare)
    if letters and not re.search("[A-J][A-J]", bare):
        return Choice("".join(sorted(re.findall("[A-J]", bare))), "")
    found = re.fullmatch(r"(?:\(([A-J])\)|([A-J])[).:])(.*)", bare)
    if not found:
        return None
    if re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z_])", found[3]):
        return Choice(bare, "")  # (B), unless it is (C) with x=3
    return Choice(found[1] or found[2], found[3])


def words(s: str) -> str | None:
    """The letters and digits of an answer that is text and not a formula (Monday, no solution),
    else None."""
    if r"\text{" in s:
        rest = re.sub(r"\\text\{[^{}]*\}|[ .,;'!-]", "", s)
        is_text = not rest or (rest.isdecimal() and s.startswith(r"\text"))  # June 20
    else:
        word = re.fullmatch(r"[a-zA-Z]{4,}\d*|yes|no|odd", s, re.I)
        is_text = word and s.rstrip("0123456789") not in FUNCTIONS
    if not is_text:
        return None
    return re.sub(r"[^a-z0-9]", "", s.replace(r"\text{", "").lower())


def words_in(s: str) -> set[str]:
    """The words in a formula that name no function."""
    return {in_text + bare for in_text, bare in WORDS.findall(s)} - FUNCTIONS


def letters_in(s: str) -> set[str]:
    return set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", s)))


# ----------------------------------------------------------------------------- before any parser

TOWER = re.compile(  # what would cost seconds or gigabytes to work out
    r"\^[({]*-?\d{5,}|"
    # powers of powers
    r"\^[({]*-?\d+\)*\^[({]*\d+\)*\^|\^\{[^{}]*\^\{[^{}]*\^|\^[({]*-?\d\d+\^|\^[({]*\d+\^\{?\d\d|"
    # (x+1)^3000, (10!)!, 9999!
    r"[a-zA-Z][^()]*\)\^\{?\d{3,}|!\)*!|\d{4,}\)*!|"
    r"\\binom\{[^{}]*(?:\d{5,}|\^)|\\(?:sum|prod|int)\b.*(?:\d{5,}|\d\^\{?\d)"
)


def too_big(s: str) -> bool:
    """Length, depth, towers of powers, factorials of factorials."""
    return (
        len(s) > MAX_ANSWER or max(depths(s), default=0) > MAX_DEPTH or TOWER.search(s) is not None
    )


# ------------------------------------------------------------------------------------------- rules
# Each rule takes (gold, answer) and says True, False, or None: "not for me".

Verdict = bool | None


def by_number(gold: str, answer: str) -> Verdict:
    g = number(gold)
    a = number(answer)
    if None in (g, a):
        return None
    return g == a


def by_choice(gold: str, answer: str) -> Verdict:
    """B is (B) is (B) 12 is 12, but B is not C, nor (B)(C)."""
    g = choice(gold)
    a = choice(answer)
    if g and a:
        return g.letters == a.letters and ("" in (g.text, a.text) or same(g.text, a.text))
    if g and g.text:
        return same(g.text, answer)
    if a and a.text:
        return same(gold, a.text)
    return None


def by_text(gold: str, answer: str) -> Verdict:
    """Monday is monday; abcd may be a product."""
    g = words(gold)
    a = words(answer)
    if g is None and a is None:
        return None
    if g == a:
        return True
    anagrams = None in (g, a) or sorted(g) == sorted(a)
    if anagrams and gold.islower() and r"\text" not in gold + answer:
        return None
    return False


MEMBER_OF = re.compile(rf"^(?:{NAME})\\in ?(?=\\\{{|[(\[])")
SUCH_THAT = re.compile(r"\\mid|\||:|[<>]")


def by_members(gold: str, answer: str) -> Verdict:
    """Sets and lists in any order; tuples, points and intervals in theirs, with their brackets."""
    gold = MEMBER_OF.sub("", gold)
    answer = MEMBER_OF.sub("", answer)
    gold_kind, golds = listed(gold)
    answer_kind, answers = listed(answer)
    kinds = {gold_kind, answer_kind}
    if kinds == {""} and len(golds) < 2 and len(answers) < 2:
        return None
    if "{}" in kinds and SUCH_THAT.search(gold + answer):
        return None  # set-builder notation
    if len(kinds) > 1 and r"\emptyset" in (gold, answer):
        return False
    if kinds <= {"", "{}"}:
        return in_any_order(golds, answers)
    if len(golds) != len(answers):
        if "" in kinds:  # an interval for an inequality
            return None
        return False
    gold_values = values_by_name(golds)
    answer_values = values_by_name(answers)
    if gold_values is None or answer_values is None:
        return False
    if (
        len(kinds) > 1
        and (gold_kind, answer_kind) != ("()", "")
        and not (answer_kind == "()" and "=" in gold)
    ):
        return False
    return in_their_order(gold_values, answer_values)


def values_by_name(named: list[str]) -> list[str] | None:
    """x=1,y=2 is (1,2), and so is y=2,x=1; None for x=1,x=2."""
    if all("=" in member for member in named):
        names = {member.partition("=")[0] for member in named}
        if len(names) < len(named):
            return None
        named = sorted(named)
    return [split(member, "=")[-1] for member in named]


def by_union(gold: str, answer: str) -> Verdict:
    golds = split(gold, r"\\cup ?")
    answers = split(answer, r"\\cup ?")
    if len(golds) > 1 and in_any_order(golds, answers):
        return True
    return None


def by_ratio(gold: str, answer: str) -> Verdict:
    golds = split(gold, ":")
    answers = split(answer, ":")
    if len(golds) == len(answers) == 1:
        return None
    return in_their_order(golds, answers)


EQUALS = r"(?<![\\<>!:])=|\\in(?![a-z]) ?"


def by_equation(gold: str, answer: str) -> Verdict:
    """x=5 is 5, f(x)=2x is 2x, x=1 is not y=1, 10/2=5 is 5; other equations are sympy's."""
    golds = split(gold, EQUALS)
    answers = split(answer, EQUALS)
    if len(golds) == len(answers) == 1:
        return None
    gold_name = name_before(golds)
    answer_name = name_before(answers)
    if gold_name and answer_name:
        if gold_name == answer_name:
            return same(golds[-1], answers[-1])
        if gold_name in answers[-1] or answer_name in golds[-1]:
            return None
        return False
    if len(golds) > 1 and len(answers) > 1:
        return None
    if gold_name or answer_name:
        return same(golds[-1], answers[-1])
    if len(golds) > 1 or re.search("[a-zA-Z]", answers[0].replace("frac", "")):
        return False
    return same(answers[0], answers[-1]) and same(gold, answers[-1])


def name_before(sides: list[str]) -> str:
    """ "x" of the sides of x=5, "" where there is no name."""
    if len(sides) > 1 and re.fullmatch(NAME, sides[0]):
        return sides[0]
    return ""


def by_unit(gold: str, answer: str) -> Verdict:
    """A unit may be missing on one side; two must agree."""
    gold_value, gold_unit = measure(gold)
    answer_value, answer_unit = measure(answer)
    values = gold_value + answer_value
    if not (gold_unit or answer_unit) or re.search(r"\\(sin|cos|tan|cot|sec|csc)", values):
        return None
    if "degree" in (gold_unit, answer_unit) and r"\pi" in values:
        return None  # 180 degrees are pi
    if r"\text" in values:
        gold_parts = measures(gold)
        return gold_parts is not None and gold_parts == measures(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    return same(gold_value, answer_value)


def by_base(gold: str, answer: str) -> Verdict:
    """1010_2: digits and base as they are written."""
    in_base = r"\(?([0-9A-F]+)\)?_\{?(\d+|\\text\{[^{}]*\})\}?"
    g = re.fullmatch(in_base, gold)
    a = re.fullmatch(in_base, answer)
    if g and a:
        return g.groups() == a.groups()
    if g:
        return g[1] == answer
    if a:
        return a[1] == gold
    return None


def by_words(gold: str, answer: str) -> Verdict:
    """A formula with other words or other letters in it is no formula: 5 (maybe 6), R for r."""
    gold_words = words_in(gold)
    answer_words = words_in(answer)
    gold_letters = letters_in(gold)
    answer_letters = letters_in(answer)
    if (
        not set("".join(answer_words - gold_words)) <= gold_letters
        or not set("".join(gold_words - answer_words)) <= answer_letters
        or set("".join(answer_letters - gold_letters).swapcase()) & gold_letters
        or any(gold.count(mark) != answer.count(mark) for mark in ("'", r"\ldots"))
        or r"\phantom" in answer
    ):
        return False
    return None


def to_sympy(s: str) -> list:
    """[the formula] with exact numbers; [], which equals nothing, when it is none."""
    s = re.sub(r"\^\\circ ?", r"\\cdot\\frac{\\pi}{180}", s.replace(";", ","))
    # {x | x > 3}
    s = re.sub(r"^\\\{[a-zA-Z](?:\\in\\mathbb\{R\})?(?:\\mid|\||:) ?(.+)\\\}$", r"\1", s)
    found = parse(
        f"${s}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    if not found:
        return []
    formula = found[0]
    exact = {x: sympy.Rational(str(x)) for x in formula.atoms(sympy.Float)}
    imaginary = {x: sympy.I for x in formula.free_symbols if x.name == "i"}
    return [formula.xreplace(exact).xreplace(imaginary)]


def by_sympy(gold: str, answer: str) -> bool:
    """The last word: math-verify on two formulas, with its rounding taken back."""
    golds = to_sympy(gold)
    answers = to_sympy(answer)
    if not verify(
        golds,
        answers,
        timeout_seconds=None,
        numeric_precision=50,
        allow_set_relation_comp=True,
    ):
        return False
    g = golds[0]
    a = answers[0]
    if g == a or not getattr(g, "is_number", False) or not getattr(a, "is_number", False):
        return True
    # verify() takes tiny numbers for 0
    gap = abs(sympy.N(g - a, 60))
    size = max(abs(sympy.N(g, 60)), abs(sympy.N(a, 60)))
    return bool(gap <= size * sympy.Float("1e-30") or gap < sympy.Float("1e-100"))


RULES = [
    by_number,
    by_choice,
    by_text,
    by_members,
    by_union,
    by_ratio,
    by_equation,
    by_unit,
    by_base,
    by_words,
    by_sympy,
]


def same(gold: str, answer: str) -> bool:
    """Do two plain() answers mean the same? The first of RULES that knows says so; the last one
    always knows."""
    if not answer or "␣" in answer:
        return False
    if gold == answer:
        return True
    for rule in RULES:
        said = rule(gold, answer)
        if said is not None:
            return said


# --------------------------------------------------------------------------------------- verdicts

HEDGE = re.compile(  # ", or 7", "(7?)", "maybe", "scratch that"; "Final answer: 7" needs no doubt
    r"^\W{0,6}?(?:\bor\b|/|∨|->)|\b(?:maybe|perhaps|possibly|probably|alternatively|actually|wait|"
    r"hmm+|rather|(?:might|could|may) (?:also )?be|also (?:possible|plausible|accept)|"
    r"not (?:sure|certain)|guess|second thought|correct (?:this|that)|correction|scratch that|"
    r"strike that|hold on|oops|sorry|changed my mind|incorrect|is wrong|if not|or (?:maybe|is)|"
    r"answer(?: is|:| =)|is the answer|otherwise, |no, |i mean)|\?",
    re.I,
)
CANDIDATE = re.compile(r"\$([^$]{1,80})\$|\\\((.{1,80}?)\\\)|(-?\d[\d,]*(?:\.\d+|/\d+)?|\b[A-J]\b)")


def hedged(tail: str, answer: str) -> bool:
    """Does the text after the box offer something else? "..., or perhaps it is 7"."""
    hedge = HEDGE.search(tail)
    if not hedge:
        return False
    ends = [tail.rfind(end, 0, hedge.start()) for end in (". ", "\n", ": ")]
    begin = max(ends) + 1  # of its sentence
    among_letters = choice(answer) is not None
    for offer in CANDIDATE.finditer(tail, begin, hedge.end() + 60):
        other = plain(offer[offer.lastindex])
        if choice(other) and not among_letters:  # a letter is an offer among letters only
            continue
        if other != answer and not by_number(answer, other):
            return True
    return False


def judge(gold: str, answer: str, tail: str = "") -> bool:
    """Is the answer in a box right? `gold` and `answer` in LaTeX, `tail` is the text after the
    box."""
    gold = plain(gold)
    answer = plain(answer)
    if hedged(tail, answer):
        return False
    return gold == answer or (not too_big(answer) and same(gold, answer))


def readable(gold: str) -> bool:
    """Can an answer of a dataset be judged by its meaning, and not only by being the same text? Not
    so: prose, what is no LaTeX, what is too big."""
    if re.search(rf"(?:[A-Za-z]{{2,}}[\s,.;:'-]+){{{MAX_WORDS}}}", gold):
        return False
    s = plain(gold)
    return not too_big(s) and legible(s)


def readables(golds: list[str]) -> list[bool]:
    found = []
    for gold in golds:
        try:
            found.append(readable(gold))
        except Exception:  # of whatever parser
            found.append(False)
    return found


LETTER = (
    r"(?:[a-zA-Z§]|\\(?:pi|alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|sigma|rho|infty)"
    r"(?![a-zA-Z]) ?)"
)
ATOM = rf"(?:(?>\d+(?:\.\d+)?)|{LETTER})"
POWER = rf"(?:\^-?{ATOM}|\^\\circ(?![a-zA-Z]) ?|_{ATOM}|[!'])"
APPLIED = r"\\(?:(?:arc)?(?:sin|cos|tan|cot)|sec|csc|ln|log|exp)(?![a-zA-Z]) ?"
FACTOR = rf"(?:(?:{APPLIED}{POWER}?)?{ATOM}{POWER}*)"
SIGN = r"(?:[-+*/<>=]|\\(?:cdot|le|ge|ne)(?![a-zA-Z]) ?)"
FLAT = rf"[-+]?{FACTOR}++(?:{SIGN}[-+]?{FACTOR}++)*+"
GROUP = re.compile(  # what a formula is made of: the innermost groups, each a sum of products
    rf"\\frac\{{{FLAT}\}}\{{{FLAT}\}}|\\sqrt(?:\[\d\])?\{{{FLAT}\}}"
    rf"|(?<![a-z\]}}])\{{{FLAT}\}}|\({FLAT}\)|\|{FLAT}\|"
)


def well_formed(s: str) -> bool:
    """Ordinary formulas, which the parser would take a hundred times longer to accept; False is no
    verdict."""
    groups = 1
    while groups:
        s, groups = GROUP.subn("§", s)
    return re.fullmatch(FLAT, s) is not None


def parts_of(s: str) -> list[str]:
    """Of what is in brackets, of a list, of an equation, ratio or union."""
    if bracketed(s):
        return split(s.strip("\\")[1:-1].strip("\\"), "[,;]")
    if len(split(s, ";|,")) > 1:
        return members(s)
    return split(s, r"(?<![\\<>!:])=|:|\\(?:cup|in|equiv)(?![a-z]) ?")


def legible(s: str) -> bool:
    """One of RULES knows all parts of it."""
    s = re.sub(r"\\[pm]m ?(?!od)", "+", s)
    if number(s) is not None or choice(s) or words(s) or re.fullmatch(r"[0-9A-F]+_\{?\d+\}?", s):
        return True
    if not s or "␣" in s:
        return False
    parts = parts_of(s)
    if len(parts) > 1:
        return all(map(legible, parts))
    value = measure(re.sub(r"\\pmod\{?(\w+)\}?$", "", s)).value
    if value != s:
        return legible(value)
    return re.fullmatch(NAME, s) is not None or well_formed(s) or by_sympy(s, s)


WARM_UP = r"""2x^2+3x-1 (x+1)(x-2)^{n+1} \frac{\sqrt{3}}{2} -\frac{x+1}{2y} 2^{10}\cdot3
\sqrt[3]{2}+\sqrt2 2.5\pi \frac{2\pi}{3} \sin(2x)+\cos^2x \tan\frac{\pi}{4}
\log_2(8) \ln(x)+e^{-2x} \binom{5}{2} 5!+n! |x-1| 3+4i e^{i\pi/3} (0,1] x>3 1<x\le2
x^2+y^2=4 y=2x+1 f(x)=x^2 a_n=2n+1 [0,1)\cup(2,\infty) \{1,2\} 1,2,3 (1,2,3) x\neq0
\mathbb{R} \begin{pmatrix}1&2\\3&4\end{pmatrix} \lfloor2.5\rfloor \arctan(1/2)
2\sqrt{3}-1 \sqrt{5+2\sqrt6} \frac{1}{1+\frac1x} x_1+x_2 \infty
\mathbb{R}\setminus\{0\} 3x\sqrt{x}+\sqrt{x+1} \frac{n(n+1)}{2} \frac{a^2b}{c}+ab
\sin30^\circ"""


def warm_up():
    """What every math process has behind it: the parser builds its tables, and sympy imports, at
    the first use."""
    for s in WARM_UP.split():
        judge(s, s.replace("x", "x+0"))
        by_sympy(s, s)
