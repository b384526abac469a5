"""python tools/bench/bench_data.py [--rows 480000]: seconds and memory to load a dataset like Eurus-2-RL-Data.

Writes made-up rows in the published schema (455 of 482 math, the others code with 60 KB of tests each), trains a
tokenizer of 30,000 merges on them, and loads them twice in a process of their own. Limits: 180 s, 4 GB, on two cores.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ppo  # noqa: E402, F401, I001  (first: the guard for the name `kernels`)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import fixtures  # noqa: E402

SYSTEM = fixtures.SYSTEM * 13  # 2,400 characters, as the published one

CHUNK = 10_000  # rows of a row group
MATH = 455 / 482
MATH_SOURCES = "aops_forum synthetic_math amc_aime synthetic_amc cn_k12 olympiads orca_math gsm8k math metamath".split()
MATH_SOURCES = [f"numina_{name}" for name in MATH_SOURCES]
CODE_SOURCES = ["taco", "codecontests", "apps", "codeforces"]
BAD_ANSWERS = [
    "",
    " ",
    r"\frac{1}{",
    r"\sqrt{2",
    "The proof follows from the lemma above by induction on n. " * 20,
]
WORDS = "yes no Monday blue even odd isosceles parabola Alice increasing north ellipse".split()
BAD_TESTS = [
    '{"inputs": [], "outputs": []}',
    '{"inputs": ["1"], "outputs": []}',
    "{'inputs': ['1']}",
    "[]",
]

# ------------------------------------------------------------------------------------------------------------- the text


def make_sentences(rng: random.Random, count: int = 20_000) -> list[str]:
    """Made-up words by Zipf's law, and one piece of LaTeX in three sentences."""
    starts = "b br c ch d f g gr h l m n p pr qu r s st t tr v w".split()
    ends = "a e i o u al an en er in or ing".split()
    made = (range(rng.randint(1, 4)) for _ in range(40_000))
    words = sorted(
        {"".join(rng.choice(starts) + rng.choice(ends) for _ in syllables) for syllables in made}
    )
    rng.shuffle(words)
    heights = list(accumulate(1 / (n + 3) for n in range(len(words))))
    out = []
    for _ in range(count):
        picked = rng.choices(words, cum_weights=heights, k=rng.randint(5, 18))
        if rng.random() < 0.35:
            picked.insert(rng.randrange(len(picked)), f"${formula(rng)}$")
        out.append(" ".join(picked).capitalize() + rng.choice([". ", ". ", "? ", ".\n"]))
    return out


def text(rng: random.Random, sentences: list[str], length: int) -> str:
    made = f"Let $n = {rng.randrange(10**7)}$. "
    while len(made) < length:
        made += rng.choice(sentences)
    return made[: max(60, length)]


def term(rng: random.Random, depth: int) -> str:
    x, n = rng.choice("abcknrtxyz"), rng.randint(2, 99)
    if depth == 0:
        return rng.choice(
            [x, x, str(n), rf"{n}{x}", r"\pi", rf"{x}^{{{rng.randint(2, 9)}}}", rf"\sqrt{{{n}}}"]
        )
    a = term(rng, depth - 1)
    return rng.choice(
        [
            rf"\sqrt{{{a}}}",
            rf"\frac{{{a}}}{{{term(rng, 0)}}}",
            rf"{n}\left({a}\right)",
            rf"\sin\left({a}\right)",
            rf"\cos({a})",
            rf"\ln({a})",
            rf"\left({a}\right)^{{{rng.randint(2, 5)}}}",
            rf"\frac{{{n}\pi}}{{{n % 7 + 2}}}",
            rf"\sqrt[3]{{{a}}}",
            rf"\tan {n}^\circ",
            rf"2^{{{x}}}",
            rf"\log_{{{rng.randint(2, 9)}}}({a})",
        ]
    )


def formula(rng: random.Random) -> str:
    parts = [term(rng, rng.choice([0, 0, 0, 1, 1])) for _ in range(rng.choice([1, 2, 2, 3]))]
    return rng.choice(["", "", "-"]) + rng.choice([" + ", " - ", "+", "-"]).join(parts)


def number(rng: random.Random) -> str:
    a, b = round(rng.lognormvariate(4, 2)), rng.randint(2, 60)
    kind = rng.random()
    if kind < 0.7:
        return str(a)
    if kind < 0.9:
        return rf"\frac{{{rng.randint(1, 99)}}}{{{b}}}"
    others = [
        f"{a / 100}",
        f"-{a}",
        f"{a:,}",
        rf"{a}\%",
        rf"\${a}",
        rf"{a}^\circ",
        rf"{a}\text{{ cm}}",
        f"{b}/{b + 1}",
    ]
    return rng.choice(others)


def answer(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return number(rng)
    if kind < 0.65:
        return rng.choice(["A", "B", "C", "D", "E", r"\text{(A)}", r"\textbf{(C)}", "(B)"])
    if kind < 0.75:
        a, b = sorted((rng.randint(-50, 50), rng.randint(51, 999)))
        return rng.choice(
            [
                f"({a}, {b})",
                f"[{a},{b})",
                rf"({a}, \infty)",
                rf"\{{{a}, {b}\}}",
                f"x = {a}",
                f"{a}, {b}",
                f"y = {b}x + {abs(a)}",
                rf"(-\infty,{a}) \cup ({b},\infty)",
                f"x > {a}",
                f"({a}, {b}, 7)",
            ]
        )
    if kind < 0.95:
        return formula(rng)
    return rf"\text{{{rng.choice(WORDS)}}}" if kind < 0.97 else rng.choice(BAD_ANSWERS)


def make_fragments(rng: random.Random, count: int = 1_500) -> list[tuple[str, str]]:
    """(input, output) of a test, as JSON already."""
    out = []
    for _ in range(count):
        size = min(40_000, max(1, round(rng.lognormvariate(5, 1.8))))
        lines = "\n".join(
            " ".join(map(str, (rng.randrange(10**6) for _ in range(8))))
            for _ in range(-(-size // 8))
        )
        out.append(
            (
                json.dumps(f"{size}\n{lines}\n"),
                json.dumps(f"{rng.randrange(10**9)}\n" * rng.randint(1, 5)),
            )
        )
    return out


def code_tests(rng: random.Random, fragments: list[tuple[str, str]]) -> str:
    """About 60 KB: half of the rows have less than 10, some more than 1,000."""
    if rng.random() < 0.01:
        return rng.choice(BAD_TESTS)
    wanted, size, picked = min(4e6, rng.lognormvariate(9.4, 1.7)), 0, []
    while size < wanted and len(picked) < 500 or not picked:
        picked.append(rng.choice(fragments))
        size += len(picked[-1][0])
        if size > 2 * wanted and len(picked) > 1:
            size -= len(picked.pop()[0])
            break
    inputs, outputs = (", ".join(part) for part in zip(*picked))
    return f'{{"inputs": [{inputs}], "outputs": [{outputs}]}}'


# ------------------------------------------------------------------------------------------------------------- the file


def chunk(
    rng: random.Random, first: int, count: int, split: str, sentences: list[str], fragments: list
) -> pa.Table:
    users, truths, sources, abilities = [], [], [], []
    for _ in range(count):
        code = rng.random() > MATH if split == "train" else rng.random() < 0.5
        length = rng.lognormvariate(6.5, 0.5) if code else rng.lognormvariate(5.68, 0.6)
        length = (
            rng.randint(8_000, 16_000)
            if rng.random() < 0.01
            else round(min(2_500, max(60, length)))
        )
        users.append(text(rng, sentences, length) + (fixtures.FENCE if code else fixtures.BOXED))
        truths.append(code_tests(rng, fragments) if code else answer(rng))
        sources.append(rng.choice(CODE_SOURCES if code else MATH_SOURCES))
        abilities.append("code" if code else "math")
    contents = [part for user in users for part in (SYSTEM, user)]
    fields = list(fixtures.EURUS.field("prompt").type.value_type)
    messages = pa.StructArray.from_arrays(
        [pa.array(contents), pa.array(["system", "user"] * count)], fields=fields
    )
    prompts = pa.ListArray.from_arrays(np.arange(0, 2 * count + 1, 2, dtype=np.int32), messages)
    reward = [pa.array(truths), pa.array(["rule"] * count)]
    extra = [pa.array(range(first, first + count)), pa.array(["dummy"] * count)]
    structs = [
        pa.StructArray.from_arrays(parts, fields=list(fixtures.EURUS.field(name).type))
        for parts, name in ((reward, "reward_model"), (extra, "extra_info"))
    ]
    return pa.Table.from_arrays(
        [pa.array(sources), prompts, pa.array(abilities), *structs], schema=fixtures.EURUS
    )


def write(path: Path, rows: int, split: str, sentences: list[str], seed: int) -> None:
    rng = random.Random(f"{split} {seed}")
    fragments = make_fragments(rng)
    with pq.ParquetWriter(path, fixtures.EURUS) as writer:
        for first in range(0, rows, CHUNK):
            writer.write_table(
                chunk(rng, first, min(CHUNK, rows - first), split, sentences, fragments)
            )


def train_tokenizer(path: Path, sentences: list[str], merges: int = 30_000) -> None:
    core = Tokenizer(models.BPE())
    words = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # Qwen's
    parts = [
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {
        "vocab_size": merges + 256,
        "initial_alphabet": alphabet,
        "special_tokens": fixtures.SPECIAL,
    }
    trainer = trainers.BpeTrainer(min_frequency=0, show_progress=False, **options)
    core.train_from_iterator([*sentences, SYSTEM, fixtures.BOXED, fixtures.FENCE], trainer)
    options = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": fixtures.QWEN,
    }
    PreTrainedTokenizerFast(tokenizer_object=core, **options).save_pretrained(path)


# ---------------------------------------------------------------------------------------------------------- the measure

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import ppo, data
from transformers import AutoTokenizer
tok = AutoTokenizer.from_pretrained({tokenizer!r})
began = time.perf_counter()
loaded = data.load(data.Source(task="math,code", data=({where!r},), template="chat"), tok)
print(loaded.report)
for name, rows in loaded.train.items():
    print(f"{{name}}: {{len(rows):,}} rows to train on, {{len(loaded.test[name])}} held out")
print(f"load: {{time.perf_counter() - began:.1f}} s")
began = time.perf_counter()
for step in range(20):
    data.batch(loaded.train, 1000 + step, 256, 0, loaded.weights)
print(f"batch of 256: {{(time.perf_counter() - began) / 20 * 1000:.0f}} ms")
"""


def tree(root: int) -> list[int]:
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(
                Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            pass  # it has ended
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory(pids: list[int]) -> tuple[float, float]:
    """GB of all of them: proportional set size, pages of mapped files included, and what of it is no file's."""
    total = {"Pss:": 0, "Pss_Anon:": 0}
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if (words := line.split())[0] in total:
                    total[words[0]] += int(words[1])
        except OSError:
            pass
    return total["Pss:"] / 1e6, total["Pss_Anon:"] / 1e6


def measure(what: str, rows: int, folder: Path) -> tuple[float, float]:
    script = SCRIPT.format(
        root=str(ROOT), tokenizer=str(folder / "tokenizer"), where=str(folder / "data")
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    began, peak, peak_anonymous, most = time.perf_counter(), 0.0, 0.0, 0
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        pids = tree(process.pid)
        here, anonymous = memory(pids)
        peak, peak_anonymous, most = (
            max(peak, here),
            max(peak_anonymous, anonymous),
            max(most, len(pids)),
        )
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    print(
        f"{what}: {seconds:.1f} s with imports, {rows / seconds:,.0f} rows/s; up to {most} processes, together "
        f"{peak:.2f} GB (peak of PSS), of it {peak_anonymous:.2f} GB not of files; exit {process.returncode}\n",
        flush=True,
    )
    return seconds, peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=480_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="keep the files here; what is there already is used")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="ppo-bench-"))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    began, sentences = time.perf_counter(), make_sentences(random.Random(arguments.seed))
    if not (folder / "tokenizer").exists():
        write(folder / "data" / "train.parquet", arguments.rows, "train", sentences, arguments.seed)
        write(
            folder / "data" / "validation.parquet", 2_048, "validation", sentences, arguments.seed
        )
        sizes = {
            path.name: f"{path.stat().st_size / 1e6:.0f} MB" for path in (folder / "data").iterdir()
        }
        print(
            f"wrote {arguments.rows:,} rows in {time.perf_counter() - began:.0f} s: {sizes}",
            flush=True,
        )
        train_tokenizer(folder / "tokenizer", sentences)
        print(f"with the tokenizer: {time.perf_counter() - began:.0f} s", flush=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    first, peak = measure("first load", arguments.rows, folder)
    measure("second load", arguments.rows, folder)
    if not arguments.folder:
        shutil.rmtree(folder)
    if first > 180 or peak > 4:
        sys.exit(f"over the limits of 180 s and 4 GB: {first:.0f} s, {peak:.2f} GB")
