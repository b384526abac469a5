"""Do two LaTeX answers mean the same? A program for the sandbox: rewards.py has it imported there and nowhere else,
since it puts forty regular expressions, a LaTeX parser and sympy to hostile text, and only a process can be killed.

Owns: equality of mathematical answers. plain() rewrites both in one form, RULES decide exactly what they can
(rationals, units, choices, sets, intervals, equations), and math-verify has the last word on formulas.
Refuses to know: where the answer stood in the response, rewards, time limits.
Left out on purpose: tolerance. 0.333 is not 1/3, 10001 is not 10000, 50 is not 0.5, 5 cm is not 5 m.
"""
import itertools
import re
from fractions import Fraction

import sympy
from math_verify import LatexExtractionConfig, parse, verify

MAX_ANSWER, MAX_DEPTH = 1000, 20  # characters and nested brackets of an answer that a parser may see
MAX_WORDS = 8  # of an answer that is text; nobody finds the words of a longer one
SIGNS = str.maketrans({sign: to for signs, to in (  # Unicode that answers are full of
    ("\u200b\u2060\ufeff", ""), ("\xa0\u2009\u202f", " "), ("−–", "-"), ("÷⁄", "/"), ("，", ","), ("：", ":"),
    ("（", "("), ("）", ")"), ("＝", "="), ("′", "'"), ("×·⋅", r"\cdot "), ("∞", r"\infty "), ("≤", r"\le "),
    ("≥", r"\ge "), ("≠", r"\ne "), ("±", r"\pm "), ("∓", r"\mp "), ("π", r"\pi "), ("∪", r"\cup "), ("∩", r"\cap "),
    ("∈", r"\in "), ("∅", r"\emptyset "), ("€", r"\euro "), ("£", r"\pounds "), ("α", r"\alpha "), ("β", r"\beta "),
    ("θ", r"\theta "), ("λ", r"\lambda "), ("φ", r"\phi "), ("∖", r"\setminus "), ("°", r"^\circ "),
    ("ℝ", r"\mathbb{R}"), ("ℤ", r"\mathbb{Z}"), ("½", r"\frac{1}{2}"), ("⅓", r"\frac{1}{3}"), ("⅔", r"\frac{2}{3}"),
    ("¼", r"\frac{1}{4}"), ("¾", r"\frac{3}{4}"),
) for sign in signs})  # fmt: skip
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789")
COMMANDS = {name: to for names, to in (  # the many names of the same sign
    ("dfrac tfrac cfrac", r"\frac"), ("times ast", r"\cdot "), ("leq leqslant", r"\le "), ("geq geqslant", r"\ge "),
    ("neq", r"\ne "), ("lt", "<"), ("gt", ">"), ("lbrace", r"\{"), ("rbrace", r"\}"), ("varnothing", r"\emptyset "),
    ("degree", r"^\circ "), ("quad qquad", " "), ("lvert rvert vert", "|"),
    ("left right middle big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits rm bf it large Large "
     "checkmark", ""), ("dots cdots", r"\ldots "), ("backslash", r"\setminus "), ("colon", ":"),
) for name in names.split()}  # fmt: skip
FONTS = "text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|boldsymbol|emph"
FONTS += "|underline"
REWRITES = [(re.compile(pattern), to) for pattern, to in (  # in this order
    (r"√\s*(\d+|[a-zA-Z]|\([^()]*\))", r"\\sqrt{\1}"),
    (r"[⁰¹²³⁴-⁹]+", lambda m: "^{" + m[0].translate(SMALL) + "}"),
    (r"[₀-₉]+", lambda m: "_{" + m[0].translate(SMALL) + "}"),
    (r"(?<=\d)(?:\\[,! ]|\{,\}|~|\\!,|,\\!)(?=\d{3}(?!\d))", ","),  # 1{,}000
    (r"\\[()\[\]]|(?<!\\)\$", ""),
    (r"(?<!\\)\\[,;:! ]|~|\\hspace\{[^{}]*\}|\\\\\s*$", " "),
    (r"\\([a-zA-Z]+)", lambda m: COMMANDS.get(m[1], m[0])),
    (r"\\begin\{(?:[bp]|small)?matrix\}|\\begin\{array\}\{[^{}]*\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:[bp]?matrix|smallmatrix|array)\}", r"\\end{pmatrix}"),
    (r"\\begin\{(cases|aligned)\}(.*?)\\end\{\1\}", lambda m: m[2].replace(r"\\", ";").replace("&", "")),
    (r"\{([^{}]+)\\choose\s*([^{}]+)\}|\bC_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1\3}{\2\4}"),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])", r"^\\circ "),
    (r"\\%", "%"),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (rf"\\(?:{FONTS})\s*\{{([^{{}}]*)\}}", lambda m: plain_font(m[1])),
    (r"\\f?box(?:ed)?\s*\{([^{}]*)\}", r"\1"),
    (r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|,\s+", ";"),  # 100, 200 is a list, 100,200 is a number
    (r"(?<=\d)\s+([mgshLNJWV])$", r"\\text{\1}"),  # 5 m is five meters, 5m is five times m
    (r"(\d)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),  # 2 1/2
    (r"\\log_(\w)\s*(\w+)", r"\\log_{\1}{\2}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"^\d{1,3}(?: \d{3})+$", lambda m: m[0].replace(" ", "")),
    (r"(?<=\d)\s+(?=\d)", "␣"),  # 3 5 is not 35, nor anything else
    (r"\\(frac|sqrt|sqrt\[\w+\])\s*(\w)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|\s+", lambda m: m[1] + "\0" if m[1] else ""),
    ("[\0\1]", " "),
    (r"\+\\infty", r"\\infty"),
    (r"^([^<>]+)>([^<>]+)>([^<>]+)$", r"\3<\2<\1"),
    (r"[.,;:]+$", ""),
)]  # fmt: skip
UNITS = {
    alias: names.split()[0]
    for names in """cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre|inch inche in
    |foot feet ft|yard yd|mile mi|kg kilogram|g gram|mg milligram|lb|ounce oz|second sec s|minute min|hour hr h|day|week
    |month|year yr|L l liter litre|mL ml milliliter millilitre|gallon|dollar usd \\$|cent|euro eur \\euro|yuan rmb|ton
    |pound gbp \\pounds|% percent|degree deg ^\\circ|^\\circC|^\\circF|radian rad|newton N|joule J|watt W|volt V
    |hertz Hz|pascal Pa|unit|kmh|people|student|point|way""".split("|")
    for alias in names.split()
}
BARE = "|".join(sorted((u for u in UNITS if len(u) > 1 and u.isalpha()), key=len, reverse=True))  # without \text
UNIT = re.compile(
    rf"((?:\\text\{{[^{{}}]*\}}|(?<![a-zA-Z\\])(?:{BARE})s?(?![a-zA-Z])|%|\^\\circ ?[CF]?)(?:\^\{{?[23]\}}?)?[/.]?)+$"
)
NAME = re.compile(  # what an answer may be called: x, f(x), f^{-1}(x), a_n, \angle ABC, \text{area}, (x,y)
    r"\|?(?:\\(?:angle|triangle|overline|vec|measuredangle|mathcal)\s*)*\{?(?:\\?[A-Za-z]+'*|\\text\{[^{}]*\})"
    r"(?:\^\{-1\})?(?:_\{?[\w\\{} ]+\}?)?(?:\([\w,;]*\))?\}?\|?|\([A-Za-z](?:[,;][A-Za-z])*\)"
)
HEDGE = re.compile(  # ", or 7", "(7?)", "maybe", "scratch that"; "Final answer: 7" needs no doubt
    r"^\W{0,6}?(?:\bor\b|/|∨|->)|\b(?:maybe|perhaps|possibly|probably|alternatively|actually|wait|hmm+|rather|"
    r"(?:might|could|may) (?:also )?be|also (?:possible|plausible|accept)|not (?:sure|certain)|guess|second thought|"
    r"correct (?:this|that)|correction|scratch that|strike that|hold on|oops|sorry|changed my mind|incorrect|is wrong|"
    r"if not|or (?:maybe|is)|answer(?: is|:| =)|is the answer|otherwise, |no, |i mean)|\?", re.I)  # fmt: skip
NO_UNIT = re.compile(r"""\b(?:or|maybe|perhaps|not|is|are|about|approximately|more|less|least|most|above|below|over|
under|so|but|and|also|hundred|thousand|million|billion|dozen|half|halves|third|squared|cubed|factorial|pi|plus|minus|
times|divided|base|one|two|three|four|five|six|seven|eight|nine|ten|\w+teen|\w+ty)\b|\(""".replace("\n", ""), re.I)
CANDIDATE = re.compile(r"\$([^$]{1,80})\$|\\\((.{1,80}?)\\\)|(-?\d[\d,]*(?:\.\d+|/\d+)?|\b[A-J]\b)")
WORDS = re.compile(r"\\text\{([^{}]*)\}|(?<![a-zA-Z\\_^])([a-zA-Z]{3,})")
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp max min gcd lcm det mod".split())
TOWER = re.compile(  # what would cost seconds or gigabytes to work out
    r"\^[({]*-?\d{5,}|\^[({]*-?\d+\)*\^[({]*\d+\)*\^|\^\{[^{}]*\^\{[^{}]*\^|\^[({]*-?\d\d+\^|"  # powers of powers
    r"\^[({]*\d+\^\{?\d\d|"
    r"[a-zA-Z][^()]*\)\^\{?\d{3,}|!\)*!|\d{4,}\)*!|"  # (x+1)^3000, (10!)!, 9999!
    r"\\binom\{[^{}]*(?:\d{5,}|\^)|\\(?:sum|prod|int)\b.*(?:\d{5,}|\d\^\{?\d)"
)


def plain_font(words: str) -> str:
    """Fonts do not matter: what is not a word is itself, words stay together as \\text{words}."""
    words = "\1".join(words.split())  # for a space that stays
    if words.lower() in ("and", "or", ","):
        return ";"
    if not re.search(r"[A-Za-z]{2}", words):
        return f" {words}" if len(words) == 1 else words
    if words in FUNCTIONS:
        return f"\\{words} "
    measured = re.fullmatch(r"(-?\d[\d.,/]*)\1?([A-Za-z].*)", words)  # \text{5 cm}
    return rf"{measured[1]}\text{{{measured[2]}}}" if measured else rf"\text{{{words}}}"


def plain(latex: str) -> str:
    """LaTeX without what does not change its meaning: fonts, spaces, sizes, the many names of the same sign."""
    latex = latex.translate(SIGNS)
    for pattern, to in REWRITES:
        latex = pattern.sub(to, latex.strip(" \n"))
    while latex[:1] in ("{", "(") and closing(latex) == len(latex) - 1:
        if latex[0] == "(" and re.search("[,;]|^.[A-J].$", latex):  # a point, or choice (B)
            break
        latex = latex[1:-1]
    return latex


def closing(s: str) -> int:
    """Where the bracket that opens `s` closes; -1 when it does not."""
    depth = 0
    for token in re.finditer(r"[({\[\])}]", s):
        depth += 1 if token[0] in "({[" else -1
        if depth == 0:
            return token.start()
    return -1


def split(s: str, separator: str) -> list[str]:
    """`s` at the separators (a regular expression) that are inside no bracket."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"({separator})|[({{\[\])}}]", s):
        if token[1] is None:
            depth += 1 if token[0] in "({[" else -1
        elif depth == 0:
            parts.append(s[start : token.start()])
            start = token.end()
    return [*parts, s[start:]]


def members(s: str) -> list[str]:
    """The members of a list: 1,2 and \\pm 3 (two of them) and (x,y)=(1,2) (x=1,y=2)."""
    found = []
    parts = [part for part in split(s, r";|,(?!\d{3}(?!\d))") if part]
    for part in parts:
        sides = [bracketed(side) for side in split(part, "=")]
        if len(sides) == 2 and all(sides) and len(sides[0][1]) == len(sides[1][1]):
            if len(parts) > 1:
                found.append(split(part, "=")[1])
                continue
            found += [f"{name}={value}" for name, value in zip(sides[0][1], sides[1][1])]
        elif r"\pm" in part:
            found += [re.sub(r"\\pm ?", "", re.sub(r"(?<=[^=(])\\pm ?", "+", part)), re.sub(r"\\pm ?", "-", part)]
        else:
            found.append(part)
    return found


def bracketed(s: str) -> tuple[str, list[str]] | None:
    """("[)", ["0", "1"]) for [0,1), ("{}", ["1", "2"]) for the set \\{1,2\\}; None when no bracket holds all of `s`."""
    inner = s.removeprefix("\\") if s.startswith("\\{") else s
    if inner[:1] not in ("(", "[", "{") or closing(inner) != len(inner) - 1:
        return None
    return inner[0] + inner[-1], members(inner[1:-1].removesuffix("\\"))


def number(s: str) -> Fraction | None:
    """The exact value of an integer, decimal (1,000.5 or 0.3\\overline{6}), fraction, mixed number or a x 10^b."""
    if s[:1] in ("-", "+"):
        value = number(s[1:]) if re.match(r"[\d.\\(]", s[1:]) else None
        return -value if value is not None and s[0] == "-" else value
    if m := re.fullmatch(r"(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*)(?:\\(?:overline|dot|bar)\{?(\d+)\}?)?)?", s, re.A):
        whole, part, period = m[1].replace(",", ""), m[2] or "", m[3]
        if not (whole or part or period):
            return None
        value = Fraction(int(whole + part or "0"), 10 ** len(part))
        return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(part)) if period else value
    if m := re.fullmatch(r"(?:(.+)(?:\\cdot ?10\^|[eE]\+?)|10\^)\{?(-?\d{1,3})\}?", s, re.A):
        value = Fraction(1) if m[1] is None else number(m[1])
        return None if value is None else value * Fraction(10) ** int(m[2])
    if m := re.fullmatch(r"(\d*)\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/]*)/([^/]*)", s, re.A):
        top, bottom = number(m[2] or m[4] or ""), number(m[3] or m[5] or "")
        return None if top is None or not bottom else int(m[1] or "0") + top / bottom
    return number(s[1:-1]) if s[:1] == "(" and closing(s) == len(s) - 1 else None


def measure(s: str) -> tuple[str, str]:
    """(what is measured, in what): ("5", "cm") of 5\\text{ cm}; the second is "" when there is no unit."""
    currency, found = re.match(r"(-?)(\\\$|\\euro ?|\\pounds ?)(?=.)", s), UNIT.search(s)
    if currency:
        return currency[1] + s[currency.end() :], UNITS[currency[2].strip()]
    if not found or not found.start() or s[found.start() - 1] in "^_=<>,(+-;" or NO_UNIT.search(found[0]):
        return s, ""
    name = re.sub(r"\\text\{([^{}]*)\}", r"\1", found[0]).replace(" per ", "/").replace("mph", "mi/h")
    name = name.replace(" ", "").rstrip(".")
    name = re.sub(r"^(?:square|sq\.?)(.+)", r"\1^2", re.sub(r"^(?:cubic|cu\.?)(.+)", r"\1^3", name))
    words = [name] if "circ" in name else re.split(r"([/^])", re.sub(r"[{}]", "", name))
    words = [w if w in UNITS else w.lower() if w.lower() in UNITS else w.lower().removesuffix("s") for w in words]
    return re.sub(r"\^\\circ ?", "", s[: found.start()]), "".join(UNITS.get(w, w) for w in words)


def choice(s: str) -> tuple[str, str] | None:
    """("B", "12") of (B) 12, ("B", "") of B or \\text{(B)}, ("AC", "") of (A) and (C)."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", s)
    if re.fullmatch(r"(?:\(?[A-J]\)?[.:)?]?|[\s;,&]|and|or)+", bare) and not re.search("[A-J][A-J]", bare):
        return "".join(sorted(re.findall("[A-J]", bare))), ""
    m = re.fullmatch(r"(?:\(([A-J])\)|([A-J])[).:])(.*)", bare)
    if m and re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z_])", m[3]):
        return bare, ""  # (B), unless it is (C) with x=3
    return m and (m[1] or m[2], m[3])


def words(s: str) -> str | None:
    """The letters and digits of an answer that is text and not a formula (Monday, no solution), else None."""
    rest = re.sub(r"\\text\{[^{}]*\}|[ .,;'!-]", "", s)
    if r"\text{" in s:
        is_text = not rest or rest.isdecimal() and s.startswith(r"\text")  # June 20
    else:
        is_text = re.fullmatch(r"[a-zA-Z]{4,}\d*|yes|no|odd", s, re.I) and s.rstrip("0123456789") not in FUNCTIONS
    return re.sub(r"[^a-z0-9]", "", s.replace(r"\text{", "").lower()) if is_text else None


def too_big(s: str) -> bool:
    """Before any parser: length, depth, towers of powers, factorials of factorials."""
    depths = itertools.accumulate((c in "({[") - (c in ")}]") for c in s)
    return len(s) > MAX_ANSWER or max(depths, default=0) > MAX_DEPTH or TOWER.search(s) is not None


# Each rule takes (gold, answer) and says True, False, or None: "not for me".


def by_number(gold: str, answer: str) -> bool | None:
    values = number(gold), number(answer)
    return None if None in values else values[0] == values[1]


def by_choice(gold: str, answer: str) -> bool | None:
    """B is (B) is (B) 12 is 12, but B is not C, nor (B)(C)."""
    g, a = choice(gold), choice(answer)
    if g and a:
        return g[0] == a[0] and (not g[1] or not a[1] or same(g[1], a[1]))
    rest = [found[1] if found else s for found, s in ((g, gold), (a, answer))]
    return same(*rest) if (g or a) and all(rest) else None


def by_text(gold: str, answer: str) -> bool | None:
    """Monday is monday; abcd may be a product."""
    texts = words(gold), words(answer)
    if texts == (None, None):
        return None
    anagrams = None in texts or sorted(texts[0]) == sorted(texts[1])
    product = anagrams and gold.islower() and r"\text" not in gold + answer
    return True if texts[0] == texts[1] else None if product else False


def by_members(gold: str, answer: str) -> bool | None:
    """Sets and lists in any order; tuples, points and intervals in theirs, with their brackets."""
    gold, answer = (re.sub(rf"^(?:{NAME.pattern})\\in ?(?=\\\{{|[(\[])", "", s) for s in (gold, answer))
    brackets = bracketed(gold), bracketed(answer)
    kinds = [b[0] if b and (b[0] == "{}" or len(b[1]) > 1) else "" for b in brackets]
    lists = [b[1] if kind else members(s) for b, kind, s in zip(brackets, kinds, (gold, answer))]
    if kinds == ["", ""] and max(map(len, lists)) < 2 or "{}" in kinds and re.search(r"\\mid|\||:|[<>]", gold + answer):
        return None  # no list, or set-builder notation
    if kinds[0] != kinds[1] and r"\emptyset" in (gold, answer):
        return False
    if set(kinds) <= {"", "{}"}:
        return len(lists[0]) == len(lists[1]) and in_any_order(*lists)
    if len(lists[0]) != len(lists[1]):
        return None if "" in kinds else False  # an interval for an inequality
    named = [sorted(ms) if all("=" in m for m in ms) else None for ms in lists]  # x=1,y=2 is (1,2), x=1,x=2 is not
    if any(ms and len({m.partition("=")[0] for m in ms}) < len(ms) for ms in named):
        return False
    values = [[split(m, "=")[-1] for m in ms or unnamed] for ms, unnamed in zip(named, lists)]
    ordered = kinds[0] == kinds[1] or kinds == ["()", ""] or (kinds[1] == "()" and "=" in gold)
    return ordered and all(same(g, a) for g, a in zip(*values))


def by_union(gold: str, answer: str) -> bool | None:
    parts = [split(s, r"\\cup ?") for s in (gold, answer)]
    return True if len(parts[0]) == len(parts[1]) > 1 and in_any_order(*parts) else None


def by_ratio(gold: str, answer: str) -> bool | None:
    parts = [split(s, ":") for s in (gold, answer)]
    return None if max(map(len, parts)) < 2 else len(parts[0]) == len(parts[1]) and all(map(same, *parts))


def in_any_order(golds: list[str], answers: list[str]) -> bool:
    left = list(answers)
    for gold in sorted(golds, key=lambda g: g not in left):  # identical ones first: they cost nothing
        found = gold if gold in left else next((a for a in left if same(gold, a)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def by_equation(gold: str, answer: str) -> bool | None:
    """x=5 is 5, f(x)=2x is 2x, x=1 is not y=1, 10/2=5 is 5; other equations are sympy's."""
    gs, xs = (split(s, r"(?<![\\<>!:])=|\\in(?![a-z]) ?") for s in (gold, answer))
    names = [parts[0] if len(parts) > 1 and NAME.fullmatch(parts[0]) else "" for parts in (gs, xs)]
    g, a = gs[-1], xs[-1]
    if len(gs) == len(xs) == 1:
        return None
    if all(names):
        return same(g, a) if names[0] == names[1] else None if names[0] in a or names[1] in g else False
    if len(gs) > 1 and len(xs) > 1:
        return None
    if len(gs) == 1 and not names[1]:
        return not re.search("[a-zA-Z]", xs[0].replace("frac", "")) and same(xs[0], a) and same(g, a)
    return any(names) and same(g, a)


def by_unit(gold: str, answer: str) -> bool | None:
    """A unit may be missing on one side; two must agree."""
    (g, gold_unit), (a, answer_unit) = measure(gold), measure(answer)
    if not (gold_unit or answer_unit) or re.search(r"\\(sin|cos|tan|cot|sec|csc)", g + a):
        return None
    if "degree" in (gold_unit, answer_unit) and r"\pi" in g + a:
        return None  # 180 degrees are pi
    if r"\text" in g + a:  # 2 hours 30 minutes
        parts = [re.findall(r"([\d./]+)\\text\{([a-z]+?)s?\}", s) for s in (gold, answer)]
        named = [[(n, UNITS.get(u, u)) for n, u in ps] for ps in parts]
        return named[0] == named[1] and all("".join(rf"{n}\text{{{u}}}" for n, u in p) == s.replace("s}", "}")
                                            for p, s in zip(parts, (gold, answer)))  # fmt: skip
    return (not gold_unit or not answer_unit or gold_unit == answer_unit) and same(g, a)


def by_base(gold: str, answer: str) -> bool | None:
    """1010_2: digits and base as they are written."""
    found = [re.fullmatch(r"\(?([0-9A-F]+)\)?_\{?(\d+|\\text\{[^{}]*\})\}?", s) for s in (gold, answer)]
    digits = [m[1] if m else s for m, s in zip(found, (gold, answer))]
    return None if found == [None, None] else digits[0] == digits[1] and (not all(found) or found[0][2] == found[1][2])


def by_words(gold: str, answer: str) -> bool | None:
    """A formula with other words or other letters in it is no formula: 5 (maybe 6), R for r."""
    spoken = [{w for m in WORDS.finditer(s) if (w := m[1] or m[2] or "") not in FUNCTIONS} for s in (gold, answer)]
    letters = [set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", s))) for s in (gold, answer)]
    unshared = [(spoken[1] - spoken[0], letters[0]), (spoken[0] - spoken[1], letters[1])]
    if any(not set(word) <= known for strange, known in unshared for word in strange) or r"\phantom" in answer:
        return False
    if any(gold.count(mark) != answer.count(mark) for mark in ("'", r"\ldots")):
        return False
    return False if any(c not in letters[0] and c.swapcase() in letters[0] for c in letters[1]) else None


def by_sympy(gold: str, answer: str) -> bool:
    """The last word: math-verify on two formulas, with its rounding taken back."""

    def read(s: str) -> list:
        s = re.sub(r"\^\\circ ?", r"\\cdot\\frac{\\pi}{180}", s.replace(";", ","))
        s = re.sub(r"^\\\{[a-zA-Z](?:\\in\\mathbb\{R\})?(?:\\mid|\||:) ?(.+)\\\}$", r"\1", s)  # {x | x > 3}
        options = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback"}
        found = parse(f"${s}$", parsing_timeout=None, **options)[:1]
        exact = [{x: sympy.Rational(str(x)) for x in f.atoms(sympy.Float)} for f in found]
        imaginary = [{x: sympy.I for x in f.free_symbols if x.name == "i"} for f in found]
        return [f.xreplace(e).xreplace(i) for f, e, i in zip(found, exact, imaginary)]

    golds, answers = read(gold), read(answer)
    options = {"timeout_seconds": None, "numeric_precision": 50, "allow_set_relation_comp": True}
    if not golds or not answers or not verify(golds, answers, **options):
        return False
    (g, a) = (*golds, *answers)
    if g != a and all(getattr(x, "is_number", False) for x in (g, a)):  # verify() takes tiny numbers for 0
        gap, size = abs(sympy.N(g - a, 60)), max(abs(sympy.N(g, 60)), abs(sympy.N(a, 60)))
        return bool(gap <= size * sympy.Float("1e-30") or gap < sympy.Float("1e-100"))
    return True


RULES = [by_number, by_choice, by_text, by_members, by_union, by_ratio, by_equation, by_unit, by_base, by_words]
RULES += [by_sympy]


def same(gold: str, answer: str) -> bool:
    """Do two plain() answers mean the same? The first of RULES that knows says so."""
    if not answer or "␣" in answer:
        return False
    return gold == answer or next(said for rule in RULES if (said := rule(gold, answer)) is not None)


def hedged(tail: str, answer: str) -> bool:
    """Does the text after the box offer something else? "..., or perhaps it is 7"."""
    hedge, lettered = HEDGE.search(tail), choice(answer) is not None
    begin = max(tail.rfind(end, 0, hedge.start()) for end in (". ", "\n", ": ")) + 1 if hedge else 0  # of its sentence
    offers = CANDIDATE.finditer(tail, begin, hedge.end() + 60) if hedge else ()
    others = [plain(m[1] or m[2] or m[3]) for m in offers]
    others = [other for other in others if lettered or not choice(other)]  # a letter is an offer among letters only
    return any(other != answer and not by_number(answer, other) for other in others)


def judge(gold: str, answer: str, tail: str = "") -> bool:
    """Is the answer in a box right? `gold` and `answer` in LaTeX, `tail` is the text after the box."""
    gold, answer = plain(gold), plain(answer)
    return not hedged(tail, answer) and (gold == answer or not too_big(answer) and same(gold, answer))


def readable(gold: str) -> bool:
    """Can an answer of a dataset be judged by its meaning, and not only by being the same text? Not so: prose, what is
    no LaTeX, what is too big."""
    s, prose = plain(gold), re.search(rf"(?:[A-Za-z]{{2,}}[\s,.;:'-]+){{{MAX_WORDS}}}", gold)
    return not (prose or too_big(s)) and legible(s)


LETTER = r"(?:[a-zA-Z§]|\\(?:pi|alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|sigma|rho|infty)(?![a-zA-Z]) ?)"
ATOM = rf"(?:(?>\d+(?:\.\d+)?)|{LETTER})"
POWER = rf"(?:\^-?{ATOM}|\^\\circ(?![a-zA-Z]) ?|_{ATOM}|[!'])"
APPLIED = r"\\(?:(?:arc)?(?:sin|cos|tan|cot)|sec|csc|ln|log|exp)(?![a-zA-Z]) ?"
FACTOR = rf"(?:(?:{APPLIED}{POWER}?)?{ATOM}{POWER}*)"
FLAT = rf"[-+]?{FACTOR}++(?:(?:[-+*/<>=]|\\(?:cdot|le|ge|ne)(?![a-zA-Z]) ?)[-+]?{FACTOR}++)*+"
GROUP = re.compile(  # what a formula is made of: the innermost groups, each a sum of products
    rf"\\frac\{{{FLAT}\}}\{{{FLAT}\}}|\\sqrt(?:\[\d\])?\{{{FLAT}\}}|(?<![a-z\]}}])\{{{FLAT}\}}|\({FLAT}\)|\|{FLAT}\|"
)


def well_formed(s: str) -> bool:
    """Ordinary formulas, which the parser would take a hundred times longer to accept; False is no verdict."""
    before = ""
    while s != before:
        before, s = s, GROUP.sub("§", s)
    return re.fullmatch(FLAT, s) is not None


def legible(s: str) -> bool:
    """One of RULES knows all parts of it."""
    s = re.sub(r"\\[pm]m ?(?!od)", "+", s)
    text = words(s)
    if number(s) is not None or choice(s) or text or re.fullmatch(r"[0-9A-F]+_\{?\d+\}?", s):
        return True
    if not s or "␣" in s:
        return False
    held, named = bracketed(s), NAME.fullmatch(s)
    sides = split(s, r"(?<![\\<>!:])=|:|\\(?:cup|in|equiv)(?![a-z]) ?")
    listed = members(s) if len(split(s, ";|,")) > 1 else sides
    parts = split(s.strip("\\")[1:-1].strip("\\"), "[,;]") if held else listed
    if len(parts) > 1:
        return all(map(legible, parts))
    measured, unit = measure(re.sub(r"\\pmod\{?(\w+)\}?$", "", s))
    return legible(measured) if unit or measured != s else named is not None or well_formed(s) or by_sympy(s, s)


def readables(golds: list[str]) -> list[bool]:
    found = []
    for gold in golds:
        try:
            found.append(readable(gold))
        except Exception:  # of whatever parser
            found.append(False)
    return found


WARM_UP = r"""2x^2+3x-1 (x+1)(x-2)^{n+1} \frac{\sqrt{3}}{2} -\frac{x+1}{2y} 2^{10}\cdot3 \sqrt[3]{2}+\sqrt2 2.5\pi
\frac{2\pi}{3} \sin(2x)+\cos^2x \tan\frac{\pi}{4} \log_2(8) \ln(x)+e^{-2x} \binom{5}{2} 5!+n! |x-1| 3+4i e^{i\pi/3}
(0,1] x>3 1<x\le2 x^2+y^2=4 y=2x+1 f(x)=x^2 a_n=2n+1 [0,1)\cup(2,\infty) \{1,2\} 1,2,3 (1,2,3) x\neq0 \mathbb{R}
\begin{pmatrix}1&2\\3&4\end{pmatrix} \lfloor2.5\rfloor \arctan(1/2) 2\sqrt{3}-1 \sqrt{5+2\sqrt6} \frac{1}{1+\frac1x}
x_1+x_2 \infty \mathbb{R}\setminus\{0\} 3x\sqrt{x}+\sqrt{x+1} \frac{n(n+1)}{2} \frac{a^2b}{c}+ab \sin30^\circ"""


def warm_up() -> None:
    """What every math process has behind it: the parser builds its tables, and sympy imports, at the first use."""
    for s in WARM_UP.split():
        judge(s, s.replace("x", "x+0"))
        by_sympy(s, s)


if __name__ == "__main__":  # python equality.py: a few verdicts
    pairs = [(r"\frac{1}{2}", "0.5"), ("5", r"5\text{ cm}"), ("5", "5 or 6"), ("x=5", "5"), ("[0,1)", "(0,1)")]
    for gold, answer in pairs:
        print(f"{judge(gold, answer)!s:5s} {gold:12s} {answer}")
