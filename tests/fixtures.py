"""Small files of exactly the published schemas, good rows and malformed ones, and a tokenizer that can encode any text.

Rows are plain dicts; text may be given as bytes, which then need not be UTF-8. Every user text starts with a mark,
"[17]", so that a test can say which rows were kept: see `mark`.
"""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# ------------------------------------------------------------------------------------------------------- the tokenizer

QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(path: Path, template: str = QWEN, first: int = 0) -> PreTrainedTokenizerFast:
    """Bytes, without merges; `first` moves the ids, for a tokenizer that differs in nothing else. Saved under path."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet[first:] + alphabet[:first])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    wrapped.save_pretrained(path)
    return wrapped


# --------------------------------------------------------------------------------------------------------- the schemas

TEXT = pa.string()
EURUS = pa.schema(
    [
        ("data_source", TEXT),
        ("prompt", pa.list_(pa.struct([("content", TEXT), ("role", TEXT)]))),
        ("ability", TEXT),
        ("reward_model", pa.struct([("ground_truth", TEXT), ("style", TEXT)])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", TEXT)])),
    ]
)
VERL = pa.schema(  # what veRL's own preprocessing writes: another order of the fields, large types, more columns
    [
        ("data_source", pa.large_string()),
        ("prompt", pa.large_list(pa.struct([("role", TEXT), ("content", pa.large_string())]))),
        ("ability", TEXT),
        ("reward_model", pa.struct([("style", TEXT), ("ground_truth", pa.large_string())])),
        (
            "extra_info",
            pa.struct(
                [("answer", TEXT), ("index", pa.int64()), ("question", TEXT), ("split", TEXT)]
            ),
        ),
        ("__index_level_0__", pa.int64()),
    ]
)
COUNTDOWN = pa.schema([("target", pa.int64()), ("nums", pa.list_(pa.int64()))])


def binary(kind: pa.DataType) -> pa.DataType:
    """The same type with bytes in the place of text."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(binary(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(binary(kind.value_type))
    return kind


def as_text(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array of binary(kind) as one of `kind`: nobody checks that the bytes are UTF-8."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.Array.from_buffers(
            kind, len(array), array.buffers(), array.null_count, array.offset
        )
    if pa.types.is_struct(kind):
        parts = [as_text(array.field(i), field.type) for i, field in enumerate(kind)]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=array.is_null())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        return make.from_arrays(
            array.offsets, as_text(array.values, kind.value_type), kind, mask=array.is_null()
        )
    return array


def as_bytes(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, dict):
        return {key: as_bytes(part) for key, part in value.items()}
    return [as_bytes(part) for part in value] if isinstance(value, list) else value


def parquet(path: Path, rows: list[dict], schema: pa.Schema = EURUS, **options) -> str:
    columns = []
    for field in schema:
        values = [as_bytes(row.get(field.name)) for row in rows]
        columns.append(as_text(pa.array(values, binary(field.type)), field.type))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, **options)
    return str(path)


def jsonl(path: Path, lines: list[dict | bytes], end: bytes = b"\n", begin: bytes = b"") -> str:
    """Lines given as bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(begin + b"".join(line + end for line in raw))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------- rows

SYSTEM = (
    "\nWhen tackling complex reasoning tasks, you have access to the following actions. Use them as needed to progress "
    "through your thought process.\n\n[ASSESS]\n\n[ADVANCE]\n\n[VERIFY]\n\n[OUTPUT]\n"
)
BOXED = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
FENCE = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."


def mark(row: dict) -> int:
    """17 of a row whose user text begins with [17]."""
    text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    return int(re.search(r"\[(\d+)\]", text)[1])


def eurus(
    n: int,
    ability: str,
    truth: object,
    text: object = None,
    source: str = "",
    split: str = "train",
    **other,
):
    """One row of Eurus-2-RL-Data. `text` without the mark and the suffix, or a whole list of messages."""
    suffix = {"math": BOXED, "code": FENCE}.get(ability, "")
    if not isinstance(text, list):
        text = f"Problem [{n}]: what is {n} + {n}?" if text is None else text
        text = as_bytes(f"[{n}] ") + as_bytes(text) + suffix.encode()
        text = [{"content": SYSTEM, "role": "system"}, {"content": text, "role": "user"}]
    row = {
        "data_source": source or {"code": "taco"}.get(ability, "numina_cn_k12"),
        "prompt": text,
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": n, "split": "train" if split == "train" else "dummy"},
    }
    return row | other


def tests(inputs: object, outputs: object, **other) -> str:
    return json.dumps({"inputs": inputs, "outputs": outputs, **other})


GOOD_ANSWERS = [
    "4",
    r"\frac{1}{2}",
    r"\frac{\sqrt{3}}{2}",
    "(1, 2]",
    r"\{1,2\}",
    r"\text{Monday}",
    "x=5",
    "B",
]
GOOD_TESTS = [
    tests(["1 2\n", "3 4\n"], ["3\n", "7\n"]),
    tests(["5\n"], ["25\n"], fn_name=None),
    tests(["[1, 2]\n3", '["a"]\n0'], ["[4, 5]", '"b"'], fn_name="solve"),
]
UTF8, TYPE, JSON, OBJECT = (
    "UTF-?8|Unicode",
    "wrong type|neither text|not text",
    "JSON",
    "JSON|object",
)
NONE, UNEQUAL, NO_ANSWER, LONG = "no tests", "unequal", "no answer", "over 1,?000 tokens"
LOST, TASK, LEAK = "cannot (be )?(read|judge)", "not asked for", "also .*(test|held)"
ANY = "."  # the contract does not say how it is called
PROSE = (
    "The answer depends on whether the reader takes the word to mean one thing or some other thing. "
    * 30
)
DEEP = "[" * 100_000 + "]" * 100_000

BAD_MATH = [  # (answer, reason)
    ("", NO_ANSWER),
    (" \n", NO_ANSWER),
    (None, f"{NO_ANSWER}|{TYPE}"),
    (r"\frac{1}{", LOST),
    (PROSE, LOST),
    (b"4\xff", UTF8),
    ("4\ud800", UTF8),
]
BAD_CODE = [
    (tests([], []), NONE),
    (tests(["1\n", "2\n"], ["1\n"]), UNEQUAL),
    (tests(["1\n"], []), f"{UNEQUAL}|{NONE}"),
    ("{'inputs': ['1'], 'outputs': ['1']}", JSON),
    ("", f"{JSON}|{NONE}"),
    (None, f"{JSON}|{NONE}|{TYPE}"),
    ('{"inputs": ["1"], "outputs": ["1"', JSON),
    (DEEP, JSON),
    ('{"inputs": ["1"], "outputs": [' + "9" * 5000 + "]}", f"{JSON}|{TYPE}"),
    ("[1, 2]", TYPE),
    ("null", f"{TYPE}|{NONE}"),
    ("17", TYPE),
    (json.dumps({"inputs": ["1"]}), f"{NONE}|{TYPE}|{UNEQUAL}"),
    (tests("abc", "abc"), TYPE),  # as many characters as characters
    (tests({"a": "1"}, {"a": "1"}), TYPE),
    (tests(["1", None], ["1", "2"]), TYPE),
    (tests(["1"], ["1"], fn_name=7), TYPE),
    (tests(["1 2"], ["3"], fn_name="f"), JSON),
    (tests(["1"], ["three"], fn_name="f"), JSON),
    (tests(["1"], [""], fn_name="f"), JSON),
    (tests(["1\n" + DEEP], ["1"], fn_name="f"), JSON),
    (b'{"inputs": ["1"], "outputs": ["\xc3\x28"]}', UTF8),
]
BAD_PROMPT = [  # the answer is good
    ("word " * 3000, LONG),
    (b"two bytes that are no letter: \xff\xfe", UTF8),
    ("half a pair: \ud83d", UTF8),
    (None, "no prompt"),
    ([], "no prompt|no question"),
    ([{"content": SYSTEM, "role": "system"}], "no prompt|no question"),  # nobody asks
    ([{"content": None, "role": "user"}], TYPE),
    ([{"content": "[1] What?", "role": None}], TYPE),
]


def eurus_folder(path: Path) -> tuple[dict[str, list[int]], list[tuple[int, str]]]:
    """train.parquet and validation.parquet with every kind of row. (marks of the good rows of each task, (mark, reason)
    of the bad ones); the mark of a training row is its number."""
    held = [eurus(n, "math", "4", split="test") for n in (901, 902, 903)]
    held += [eurus(n, "code", GOOD_TESTS[0], split="test") for n in (904, 905)]
    rows, good, bad = [], {"math": [], "code": []}, []

    def add(ability: str, truth: object, reason: str = "", **other) -> None:
        rows.append(eurus(len(rows) + 1, ability, truth, **other))
        bad.append((len(rows), reason)) if reason else good[ability].append(len(rows))

    for answer in GOOD_ANSWERS:
        add("math", answer)
    for answer, reason in BAD_MATH:
        add("math", answer, reason)
    for answer in GOOD_TESTS:
        add("code", answer)
    for answer, reason in BAD_CODE:
        add("code", answer, reason)
    for text, reason in BAD_PROMPT:
        add("math", "4", reason, text=text or [])
        rows[-1]["prompt"] = None if text is None else rows[-1]["prompt"]
    for ability in ("chemistry", "biology", "Coding"):
        add(ability, "4", TASK)
    for spaces in ("  ", "\r\n"):  # the prompt of 903, whitespace aside
        text = held[2]["prompt"][1]["content"].decode().replace(" ", spaces)
        add(
            "math",
            "4",
            LEAK,
            text=[{"content": SYSTEM, "role": "system"}, {"content": text, "role": "user"}],
        )
    for answer in GOOD_TESTS:
        add("code", answer)
    parquet(path / "data" / "train.parquet", rows, row_group_size=7)
    parquet(path / "data" / "validation.parquet", held)
    return good, bad


# --------------------------------------------------------------------------------------------------------- JSONL lines


def line(n: int, text: str = "how many?", answer: object = "4", **other) -> dict:
    return {"problem": f"[{n}] {text}", "answer": answer} | other


def raw(n: int, answer: str, text: str = "raw") -> bytes:
    return f'{{"problem": "[{n}] {text}", "answer": {answer}}}'.encode()


LINES = [  # (line, what it means, or why it is dropped); the first twelve are good
    (line(1), "4"),
    (line(2, answer=42), "42"),
    (line(3, answer=3.5), "3.5"),
    (line(4, answer=-7), "-7"),
    (line(5, answer=1e-7), "0.0000001"),
    (raw(6, "1E2"), "100"),
    (line(7, notes="x" * 20_000_000), "4"),
    (line(8, notes=1), "4"),
    (line(9, notes={"a": [None]}), "4"),
    (line(10, notes=["b", 2]), "4"),
    (raw(11, '"4"', "\\ud83d\\ude00"), "4"),
    (b' \t{"answer":"4","problem":"[12]"} ', "4"),
    (line(13, "word " * 10_000), LONG),
    (line(14, answer=True), ANY),
    (line(15, answer=None), NO_ANSWER),
    (line(16, answer=["4"]), ANY),
    (line(17, answer={"a": "4"}), ANY),
    (line(18, answer=""), NO_ANSWER),
    (raw(19, "NaN"), ANY),
    (raw(20, "-Infinity"), ANY),
    (raw(21, "Infinity"), ANY),
    (raw(22, "7" * 5000), ANY),
    (raw(23, DEEP), ANY),
    (raw(24, '"4"', "\\ud800"), f"{UTF8}|{JSON}"),
    (raw(25, '"\\udc00 4"'), f"{UTF8}|{JSON}"),
    (raw(26, '"4"').replace(b"raw", b"\xff"), f"{UTF8}|{JSON}"),
    (b'{"problem": "[27] cut', JSON),
    (b"[1, 2]", OBJECT),
    (b'"text"', OBJECT),
    (b"null", OBJECT),
    (b"17", OBJECT),
    (b"{}", ANY),
    (raw(33, '"4"') * 2, JSON),
    (b"\x00", JSON),
    (line(35) | {"problem": 35}, ANY),
    (line(36) | {"problem": None}, ANY),
    (line(37) | {"problem": " "}, ANY),
    ({"problem": "[38] no answer"}, NO_ANSWER),
    ({"answer": "4"}, ANY),
    (line(40, answer="\\frac{1}{"), LOST),
    (b'{"problem": "[41] a\\\xff", "answer": "4"}', f"{UTF8}|{JSON}"),
]

# -------------------------------------------------------------------------------------------------------- other formats

TALK = [("user", "Hello"), ("assistant", "Hi"), ("user", "2+2?")]
TALK = [{"role": role, "content": text} for role, text in TALK]
PAIR = {"inputs": ["1\n"], "outputs": ["2\n"], "fn_name": None}
CALL = {"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "f"}
FORMATS = [  # (task, rows, flags, the answers)
    (
        "math",
        [
            {"question": f"{n}?", "answer": f"He has 3*{n}=<<3*{n}=9>>9.\n#### {n}"}
            for n in (71, 72)
        ],
        {},
        ["71", "72"],
    ),
    (
        "math",
        [
            {
                "problem": f"{n}?",
                "solution": rf"So $\boxed{{\frac{{{n}}}{{2}}}}$, not 3.",
                "level": "Level 5",
                "type": "Algebra",
            }
            for n in (1, 3)
        ],
        {},
        [r"\frac{1}{2}", r"\frac{3}{2}"],
    ),
    (
        "math",
        [{"problem": f"{n}?", "solution": r"$\boxed{9}$", "answer": f"{n}"} for n in (1, 2)],
        {},
        ["1", "2"],
    ),
    ("math", [{"instruction": f"{n}?", "final_answer": f"{n}"} for n in (1, 2)], {}, ["1", "2"]),
    (
        "math",
        [{"ask": f"{n}?", "gold": f"{n}", "prompt": "no"} for n in (1, 2)],
        {"prompt_column": ("ask",), "answer_column": ("gold",)},
        ["1", "2"],
    ),
    (
        "math",
        [{"prompt": TALK, "ground_truth": "1"}, {"prompt": TALK[:1], "ground_truth": "2"}],
        {},
        ["1", "2"],
    ),
    ("code", [{"question": f"{n}?", **PAIR} for n in (1, 2)], {}, [PAIR, PAIR]),
    (
        "code",
        [{"question": f"{n}?", "answer": tests(["1\n"], ["2\n"])} for n in (1, 2)],
        {},
        [PAIR, PAIR],
    ),
    ("code", [{"question": f"{n}?", **CALL} for n in (1, 2)], {}, [CALL, CALL]),
]
