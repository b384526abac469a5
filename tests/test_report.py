"""tools/report.py: what is in the page and the PNGs of a real run, made-up seeds, hostile samples; the page in a real
browser, which takes part in tests/run.sh --all only."""

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser
import launch
import pytest
import toy as toy_task

from tools import report

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>{{DATA}}@DATA@<!--<script>"
    "\u2028 \ud800 </think><svg onload='window.hacked = 3'></svg><b id=injected>bold</b>"
)


def tokens_of(sample: dict, rng: random.Random, critic: bool = True) -> dict:
    """What the trainer adds to samples of training steps, where it has not."""
    texts = sample.get("tokens") or re.findall(r"\s*\w{1,5}|[^\w]", sample["response"]) or [""]
    numbers = {"advantages": [rng.gauss(0, 1) for _ in texts]}
    return (
        sample
        | {"tokens": texts}
        | numbers
        | ({"values": [rng.random() for _ in texts]} if critic else {})
    )


def make(folder: Path, steps: int, rows=(), samples=(), **flags) -> Path:
    """A run folder; `rows` and `samples` are added to those of a made-up run of so many steps."""
    folder.mkdir()
    seed = flags.get("seed", 0)
    rng = random.Random(seed)
    config = {"out": str(folder), "seed": seed, "prompts_per_step": 8, "task": "toy", "lr": 1}
    config |= {"model": f"{folder}.warm"}
    (folder / "config.json").write_text(json.dumps(config | flags))
    made = [{"step": 0, "eval/correct": 0.1}] * bool(steps)
    for step in range(1, steps + 1):
        made.append(
            {
                "step": step,
                "reward/mean": rng.random(),
                "reward/correct": rng.random(),
                "time/sample": 1.0,
                "time/update": 2.0,
                "time/step": 3.0,
                "policy/entropy": rng.random(),
                "toy/odd": 1.0,
                "mismatch/logp_abs_mean": 1e-6 * (1 + rng.random()),
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*made, *rows]))
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def answers(steps: int, each: int, length: int = 6) -> list[dict]:
    """Samples: the first of each step right, the second cut, the others wrong."""
    rng, rows = random.Random(0), []
    for step, i in ((step, i) for step in range(1, steps + 1) for i in range(each)):
        text = " ".join(
            rng.choice(("seven", "one", "two", "3+4=7", "maybe")) for _ in range(length)
        )
        text = text + (f"</think><answer>{step}-{i}</answer>" if i != 1 else "")
        row = {
            "step": step,
            "id": f"{step}-{i}",
            "prompt": "Add.\n<think>",
            "response": text,
            "finished": i != 1,
            "reward": float(i == 0),
            "correct": float(i == 0),
            "status": "ok" if i == 0 else "wrong",
        }
        rows.append(tokens_of(row, rng))
    return rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A real run, by plain PyTorch; with tokens, values and advantages where the trainer has not
    written them."""
    out = tmp_path_factory.mktemp("toy") / "toy-run"
    flags = ["--steps", "12", "--prompts_per_step", "64", "--eval_every", "6", "--eval_rows", "16"]
    toy_task.run(str(out), *flags)
    rng, file = random.Random(0), out / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row if "advantages" in row else tokens_of(row, rng) for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture(scope="module")
def chromium():
    if not browser.find():
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    running = browser.Browser()
    yield running
    running.close()


def page(*folders: Path, **options) -> Path:
    path = folders[0] / "report.html"
    path.write_text(
        report.build([report.read_run(folder) for folder in folders], **options), encoding="utf-8"
    )
    return path


def in_page(path: Path) -> dict:
    """The data of a page, which no text of a sample has closed or added to."""
    (found,) = re.findall(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert "<" not in found
    return json.loads(found)


def test_the_command(toy):
    """Guards a page that is not written where the message says, without --png too, or that lacks
    curves or samples of a run that ppo.py has made."""
    done = launch.run("tools/report.py", toy).good()
    assert str(toy / "report.html") in done.said and "after 12 steps" in done.said
    (run,) = in_page(toy / "report.html")["runs"]
    rows = launch.metrics(toy)
    assert run["steps"] == [row["step"] for row in rows]
    for key in ("reward/mean", "policy/entropy", "critic/explained_var", "time/step"):
        pairs = list(zip(run["curves"][key], (row.get(key) for row in rows), strict=True))
        assert all((drawn is None) == (made is None) for drawn, made in pairs)
        assert all(
            drawn == pytest.approx(made, rel=1e-3) for drawn, made in pairs if made is not None
        )
    assert run["total"] == len(run["samples"]) == len((toy / "samples.jsonl").open().readlines())


@pytest.mark.full
def test_a_real_run(toy, chromium):
    """Guards against a page that raises, asks for anything, or shows no curves, no numbers and no
    samples of a run that ppo.py has made."""
    chromium.open(page(toy))
    assert chromium.complaints() == []
    rows = [json.loads(line) for line in open(toy / "metrics.jsonl")]
    for section in ("reward", "policy", "critic", "mismatch", "time", "perf"):
        assert chromium.js(f"document.querySelectorAll('#{section} svg.plot path').length") > 0, (
            section
        )
    points = "document.querySelector('#policy path.curve').getAttribute('d').split('L').length"
    assert chromium.js(points) == len([row for row in rows if "policy/entropy" in row])
    assert chromium.js(
        "[...document.querySelectorAll('figure')].every(f => f.querySelector('svg.plot'))"
    )
    last = f"{rows[-1]['eval/correct']:.4g}"
    assert last in chromium.js("document.getElementById('runs').innerText")
    chromium.js("document.querySelector('#others').open = true")
    chromium.wait("document.querySelectorAll('#others path').length > 0")
    assert chromium.js("document.querySelectorAll('#answer, #thinking').length") > 0
    assert chromium.complaints() == []


@pytest.mark.full
def test_hover_and_keys_show_the_numbers(tmp_path, chromium):
    """Guards the numbers under the pointer: those of the nearest step, of every seed's group."""
    chromium.open(
        page(make(tmp_path / "run", 0, [{"step": i, "reward/mean": i / 8} for i in range(1, 5)]))
    )
    svg = "document.querySelector('#reward svg.plot')"
    box = chromium.js(f"(r => [r.left, r.top, r.width, r.height])({svg}.getBoundingClientRect())")
    chromium.js(
        "document.getElementById('smooth').value = 0; document.getElementById('smooth').dispatchEvent("
        "new Event('input'))"
    )
    x, y = box[0] + box[2] - 12, box[1] + box[3] / 2
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = "document.querySelector('#reward .tip')"
    assert (
        chromium.js(f"{tip}.hidden") is False
        and chromium.js(f"{tip}.innerText") == "step 4\nrun: 0.5"
    )
    chromium.js(f"{svg}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft'}}))")
    assert chromium.js(f"{tip}.innerText") == "step 3\nrun: 0.375"


def seeds(tmp_path: Path) -> tuple[list[Path], Path]:
    """Three seeds of a run; one with another learning rate."""
    runs = [make(tmp_path / f"cpu-seed{i}", 5, seed=i) for i in range(3)]
    return runs, make(tmp_path / "faster", 5, lr=2, model=f"{tmp_path}/cpu-seed0.warm")


def test_seeds_are_a_group(tmp_path):
    """Guards what is one group: runs that differ in seed, folder and warm model; another learning
    rate or model is not. The line is the mean, and the band holds all seeds."""
    runs, faster = seeds(tmp_path)
    groups = report.group_runs([report.read_run(folder) for folder in (*runs, faster)])
    assert [group["runs"] for group in groups] == [[0, 1, 2], [3]]
    assert groups[0]["name"] == "cpu (3 seeds)"
    big, small = (
        {"config": {"seed": i, "model": name}, "name": name}
        for i, name in enumerate(("m-3B", "m-0.5B"))
    )
    assert len(report.group_runs([big, small])) == 2
    members = [report.read_run(run) for run in runs]
    first, *_ = report.band(members, "reward/mean", 0.0)
    starts = [run["rows"][1]["reward/mean"] for run in members]
    assert first == pytest.approx((1, sum(starts) / 3, min(starts), max(starts)), 1e-4)


@pytest.mark.full
def test_seeds_are_a_band(tmp_path, chromium):
    """Guards the band of the page: the same numbers as in the PNGs, and a switch that shows each
    seed."""
    runs, faster = seeds(tmp_path)
    members = [report.read_run(run) for run in runs]
    chromium.open(page(*runs, faster))
    count = "[...document.querySelectorAll('#policy path')].map(p => p.getAttribute('class')).sort().join()"
    assert chromium.js(count) == "band,curve,curve,raw,raw"
    first, *_ = report.band(members, "reward/mean", 0.0)
    drawn = chromium.js(
        "(p => [p.step, p.mean, p.low, p.high])(band(data.groups[0], 'reward/mean', 0)[0])"
    )
    assert drawn == pytest.approx(first)
    smooth = chromium.js("band(data.groups[0], 'reward/mean', 0.5).map(p => p.mean)")
    assert smooth == pytest.approx([y for _, y, *_ in report.band(members, "reward/mean", 0.5)])
    assert "lr: 1 | 2" in chromium.js("document.getElementById('differs').innerText")
    chromium.js("document.getElementById('singles').click()")
    assert chromium.js(count) == "curve,curve,curve,curve,raw,raw,raw,raw"
    assert chromium.complaints() == []


@pytest.mark.full
def test_samples_can_be_walked_and_filtered(tmp_path, chromium):
    """Guards the browser of samples: buttons, slider, keys, filters, search, the end of the
    thinking."""
    chromium.open(page(make(tmp_path / "run", 3, samples=answers(3, 4))))
    where = "document.getElementById('where').textContent"

    def press(name: str) -> str:
        chromium.js(f"document.getElementById('{name}').click()")
        return chromium.js(where)

    def choose(name: str, value: str, event: str = "change") -> str:
        chromium.js(
            f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('{event}')); }})"
            f"(document.getElementById('{name}'))"
        )
        return chromium.js(where)

    assert chromium.js(where) == "step 1, sample 1 of 4 (12 match)"
    assert chromium.js("document.getElementById('thinking').textContent").endswith("</think>")
    assert chromium.js("document.getElementById('answer').textContent") == "<answer>1-0</answer>"
    assert press("next").startswith("step 1, sample 2") and press("prev").startswith(
        "step 1, sample 1"
    )
    assert "cut at the limit" not in chromium.js("document.getElementById('facts').innerText")
    assert press("on").startswith("step 2, sample 1") and press("back").startswith(
        "step 1, sample 1"
    )
    for kind in ("keyDown", "keyUp"):
        key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
        chromium.call("Input.dispatchKeyEvent", type=kind, **key)
    assert chromium.js(where).startswith("step 1, sample 2")
    assert choose("step", "2", "input").startswith("step 3, sample 1")
    assert choose("show", "right").endswith("1 of 1 (3 match)")
    assert choose("show", "cut").endswith("(3 match)")
    assert "cut at the limit" in chromium.js("document.getElementById('facts').innerText")
    assert choose("show", "wrong").endswith("(9 match)")
    choose("show", "all")
    assert choose("find", "<ANSWER>2-3", "input") == "step 2, sample 1 of 1 (1 match)"
    assert choose("find", "nowhere", "input") == "no sample matches"
    assert chromium.complaints() == []


@pytest.mark.full
def test_tokens_are_coloured(tmp_path, chromium):
    """Guards the colours: none, by value, by advantage (its sign is a hue), the numbers of a token,
    and the text, which is the same in all three."""
    tokens, values, advantages = (
        ["a", "b</th", "ink>", "c"],
        [0.0, 0.25, 0.5, 1.0],
        [-2.0, -1.0, 0.0, 2.0],
    )
    row = {
        "step": 1,
        "prompt": "p",
        "response": "head ab</think>c",
        "finished": True,
        "correct": 1.0,
        "tokens": tokens,
        "values": values,
        "advantages": advantages,
    }
    chromium.open(page(make(tmp_path / "run", 1, samples=[row])))
    spans = "[...document.querySelectorAll('#view [data-i]')]"
    text = "['thinking', 'answer'].map(i => document.getElementById(i).textContent).join('|')"
    seen = {}
    for mode in ("off", "values", "advantages"):
        chromium.js(
            f"(e => {{ e.value = '{mode}'; e.dispatchEvent(new Event('change')); }})"
            "(document.getElementById('colour'))"
        )
        seen[mode] = chromium.js(f"{spans}.map(e => e.style.backgroundColor)")
        assert chromium.js(text) == "head ab</think>|c"
    assert seen["off"] == [] and len(set(seen["values"])) == 4
    assert seen["advantages"][0].startswith("rgba(230, 120, 0") and seen["advantages"][
        3
    ].startswith("rgba(0, 114, 200")
    assert float(seen["advantages"][2].split(",")[3].strip(" )")) < 0.001
    chromium.js(f"{spans}[3].dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}))")
    told = chromium.js("document.getElementById('token').textContent")
    assert told == 'token 4 of 4 "c": value 1, advantage 2'
    assert "2" in chromium.js("document.getElementById('ramp').innerText")
    assert chromium.complaints() == []


def hostile_page(folder: Path) -> Path:
    """Of a run whose every text is HTML and JavaScript: a model may write that. Three samples."""
    rng = random.Random(0)
    hostile = {"step": 1, "id": HOSTILE, "prompt": HOSTILE, "response": HOSTILE, HOSTILE: HOSTILE}
    chat = [{"role": HOSTILE, "content": HOSTILE}, HOSTILE]
    rows = [
        hostile,
        tokens_of(hostile, rng),
        hostile | {"prompt": chat, "answer": {"<b>": HOSTILE}, "status": HOSTILE},
    ]
    return page(make(folder, 1, [{"step": 2, f"x/{HOSTILE}": 1.0}], rows, task=HOSTILE))


def test_hostile_samples_are_data_only(tmp_path):
    """Guards the reader: no text of a run may end the script that holds the data, or stand anywhere
    else in the page."""
    path = hostile_page(tmp_path / "run")
    (run,) = in_page(path)["runs"]
    assert len(run["samples"]) == 3 and run["samples"][0]["response"].startswith("</script>")
    assert "window.hacked" not in re.sub(
        r'id="data">.*?</script>', "", path.read_text(), flags=re.S
    )
    plain = page(make(tmp_path / "plain", 1))
    assert path.read_text().count("<script") == plain.read_text().count("<script")


@pytest.mark.full
def test_hostile_samples_run_nothing(tmp_path, chromium):
    """Guards the reader once more: what the page makes of such texts."""
    chromium.open(hostile_page(tmp_path / "run"))
    chromium.js("document.getElementById('others').open = true")
    for mode in ("off", "values"):
        chromium.js(f"state.colour = '{mode}'; state.at = 0")
        for _ in range(3):
            chromium.js("showSample(); moveSample(1)")
            assert "<img src=x" in chromium.js("document.getElementById('view').innerText")
    assert chromium.js("typeof window.hacked") == "undefined"
    assert (
        chromium.js(
            "document.querySelectorAll('img, script:not(#data), #injected, svg[onload]').length"
        )
        == 1
    )
    assert chromium.complaints() == []
    # the second wall: even an element that got in runs nothing and loads nothing
    chromium.js(
        "document.getElementById('view').innerHTML = `<img src=x.png onerror='window.hacked = 4'>`"
    )
    chromium.wait("new Promise(done => setTimeout(() => done(true), 200))")
    assert chromium.js("typeof window.hacked") == "undefined"


@pytest.mark.full
def test_phone_width_and_both_themes(toy, tmp_path, chromium):
    """Guards readers on phones (nothing is wider than the screen) and in the dark (text can be read
    in both)."""
    words = [{"step": 1, "prompt": "x" * 900, "response": "y" * 900}]
    wide = make(tmp_path / ("a-very-long-name-" * 6), 3, samples=words)
    contrast = """(() => { const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const l = s => { c.fillStyle = s; c.fillRect(0, 0, 1, 1);
        const v = [...c.getImageData(0, 0, 1, 1).data].slice(0, 3)
        .map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      const worst = []; for (const e of document.querySelectorAll('h1, h2, td, th, .note, .text, figcaption, label')) {
        let b = e; while (getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement;
        const x = [l(getComputedStyle(e).color), l(getComputedStyle(b).backgroundColor)].sort((p, q) => q - p);
        worst.push((x[0] + 0.05) / (x[1] + 0.05)); } return Math.min(...worst); })()"""
    grounds = []
    for path in (page(toy), page(wide)):
        for dark in (False, True):
            chromium.open(path, 390, 844, dark)
            assert chromium.js("document.scrollingElement.scrollWidth") <= 390
            assert chromium.js(contrast) >= 4.5
            grounds.append(chromium.js("getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == 2 and grounds[:2] == grounds[2:]
    chromium.js("document.getElementById('theme').click()")
    assert chromium.js("getComputedStyle(document.body).backgroundColor") == grounds[0]
    assert chromium.js(
        "[...document.querySelectorAll('svg.plot')].every(s => s.getBoundingClientRect().right <= 390)"
    )


def test_pages_stay_small(tmp_path):
    """Guards the size of the page: 2,000 samples in 5 MB; long runs of long responses in 10, with a
    word about what is missing, the first and the last step still there, and curves of at most about
    a thousand points."""
    samples = answers(200, 10, length=60)
    assert 100 <= sum(len(row["tokens"]) for row in samples) / 2000 <= 300
    built = page(make(tmp_path / "many", 200, samples=samples))
    run = report.read_run(tmp_path / "many")
    print(f"{built.stat().st_size / 1e6:.2f} MB, {len(run['samples'])} of {run['total']} samples")
    assert built.stat().st_size < 5e6 and len(run["samples"]) > 1000 and run["total"] == 2000
    numbers = list(range(16_000))
    long = {
        "response": "word " * 6_000,  # its end are the tokens
        "prompt": "p",
        "tokens": ["word "] * 2048,
        "values": numbers[:2048],
        "advantages": numbers[:2048],
    }
    extra = [{"step": step, "reward/mean": 1.0 * step} for step in range(1, 1881)]
    folder = make(tmp_path / "long", 0, extra, [{"step": step} | long for step in range(1, 1881)])
    built, run = page(folder), report.read_run(folder)
    print(f"{built.stat().st_size / 1e6:.2f} MB, {len(run['samples'])} samples")
    assert built.stat().st_size < 1e7 and len(run["steps"]) <= 1000 and run["bucket"] == 2
    assert run["curves"]["reward/mean"][:2] == [1.5, 3.5] and run["total"] == 1880
    steps = [sample["step"] for sample in run["samples"]]
    assert (steps[0], steps[-1]) == (1, 1880) and len(steps) > 100
    assert max(b - a for a, b in zip(steps, steps[1:])) <= 2 * 1880 / len(steps) + 1
    assert "left out of this page" in run["samples"][0]["response"]
    uneven = [
        {"step": step, "response": "y" * (9000 if 20 <= step % 48 < 30 else 1)}
        for step in range(1, 1881)
    ]
    samples, total = report.read_samples(
        make(tmp_path / "uneven", 0, samples=uneven) / "samples.jsonl", 200_000
    )
    assert len(report.encode(samples)) <= 200_000 and 20 < len(samples) < total == 1880


def torn(folder: Path) -> Path:
    """A run that is being written, of --advantage grpo: no keys of a critic, no values."""
    rng = random.Random(0)
    samples = [tokens_of(row, rng, critic=False) for row in answers(2, 2)]
    samples = [{key: value for key, value in row.items() if key != "values"} for row in samples]
    make(folder, 2, [{"step": 3, "reward/mean": float("nan")}], samples)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 4, "reward/mean": 0.')
    return folder


def test_torn_lines(tmp_path):
    """Guards runs that are being written: a half line, a NaN, nothing yet."""
    (run,) = in_page(page(torn(tmp_path / "run")))["runs"]
    assert run["steps"] == [0, 1, 2] and run["total"] == len(run["samples"]) == 4
    (run,) = in_page(page(make(tmp_path / "empty", 0)))["runs"]
    assert run["steps"] == [] and run["samples"] == []


@pytest.mark.full
def test_torn_lines_and_runs_without_a_critic(tmp_path, chromium):
    """Guards the page of such a run: no panels of a critic."""
    chromium.open(page(torn(tmp_path / "run")))
    assert chromium.js("document.querySelectorAll('#critic, #calibration').length") == 0
    chromium.js("state.colour = 'values'; showSample()")
    assert "has no values" in chromium.js("document.getElementById('ramp').innerText")
    chromium.js("state.colour = 'advantages'; showSample()")
    assert chromium.js("document.querySelectorAll('#view [data-i]').length") > 3
    quarters = {f"critic/{name}_q{i}": 0.1 * i for name in ("value", "return") for i in range(1, 5)}
    chromium.open(page(make(tmp_path / "critic", 1, [{"step": 2} | quarters])))
    assert chromium.js("document.querySelectorAll('#calibration svg.plot').length") == 4
    chromium.open(page(make(tmp_path / "empty", 0)))
    assert "No steps yet" in chromium.js("document.body.innerText") and chromium.complaints() == []


@contextmanager
def watching(folder: Path) -> Iterator[launch.Job]:
    """--watch, until Ctrl-C."""
    job = launch.start("tools/report.py", folder, "--watch", env={"PYTHONUNBUFFERED": "1"})
    try:
        yield job
    finally:
        os.kill(job.pid, signal.SIGINT)
        ended = job.wait()
    assert ended.code == 0, ended.said


def one_more_row(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "reward/mean": 1.0}) + "\n")


def written(folder: Path, steps: int) -> str:
    """What --watch says, once all of it is written."""
    return rf"{steps} steps; 0\.1 minutes of PPO\nreport: {re.escape(str(folder))}/report.html\n"


def test_watch_writes_new_rows(tmp_path):
    """Guards --watch: a new row is in the page soon after, and Ctrl-C leaves one that reloads
    itself no more."""
    folder = make(tmp_path / "run", 2, samples=answers(2, 2))
    with watching(folder) as job:
        job.until(written(folder, 2))
        assert in_page(folder / "report.html")["watch"] > 0
        one_more_row(folder)
        job.until(written(folder, 3))
        assert in_page(folder / "report.html")["runs"][0]["steps"][-1] == 3
    assert in_page(folder / "report.html")["watch"] == 0


@pytest.mark.full
def test_watch_shows_new_rows(tmp_path, chromium):
    """Guards a reload that does not keep what was chosen."""
    folder = make(tmp_path / "run", 2, samples=answers(2, 2))
    with watching(folder) as job:
        job.until(written(folder, 2))
        chromium.open(folder / "report.html")
        assert chromium.js("data.watch") > 0
        chromium.js("document.getElementById('next').click(); scrollTo(0, 300)")
        one_more_row(folder)
        job.until(written(folder, 3))
        chromium.js("saveState(); location.reload()")
        chromium.wait("document.readyState === 'complete' && data.runs[0].steps.at(-1) === 3")
        chromium.wait("document.getElementById('where').textContent.startsWith('step 1, sample 2')")
        chromium.wait("scrollY === 300")
    chromium.open(folder / "report.html")
    assert chromium.js("data.watch") == 0


def test_pngs(toy):
    """Guards --png: a file for each section, with something in it."""
    import matplotlib.image

    paths = report.draw([report.read_run(toy)], toy / "png", 0.5)
    assert {path.name for path in paths} >= {
        "reward.png",
        "policy.png",
        "critic.png",
        "mismatch.png",
        "time.png",
    }
    for path in paths:
        pixels = matplotlib.image.imread(path)[..., :3]
        coloured = (pixels.max(-1) - pixels.min(-1) > 0.3).mean()
        assert pixels.shape[1] >= 500 and coloured > 0.0005, path.name


@pytest.mark.parametrize("content", [None, "{}", '{"prompts_per_step"'])
def test_what_is_no_run_folder(tmp_path, content):
    """Guards the message: one line with what was given and what to give, no traceback."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    given = tmp_path if content is not None else tmp_path / "nowhere"
    done = launch.run("tools/report.py", given)
    assert done.code == 2 and len(done.said.splitlines()) == 1
    assert str(given) in done.said and "no run folder" in done.said and "--out" in done.said
    assert not (given / "report.html").exists()
