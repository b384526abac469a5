"""python report.py RUN [RUN ...]: one page about runs, report.html, that needs no network and no other file.

Owns: reading run folders (config.json, metrics.jsonl, samples.jsonl), which runs are seeds of one configuration, the
page (curves, critic calibration, samples with values and advantages of each token) and the same curves as PNGs.
Refuses to know: how a run is made; it imports nothing of the trainer, and reads what is there while a run goes on.
Left out on purpose: plotting libraries in the page (SVG by hand), a server (--watch writes the file again and the page
reloads itself), trust in samples: text of a model only ever becomes text nodes, and the page may run no other script.
"""
import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

BYTES = 4_000_000  # of samples in the page, all runs together; more are thinned out evenly over the steps
POINTS = 1_000  # of a curve; longer ones show means of neighbouring steps
CHARS = 16_000  # of a prompt or response; longer ones lose their middle
TOKENS = 2_048  # with numbers, of a sample: its last ones
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
# flags that say where, when and how, not what is learned
SAME = set("""out seed wandb wandb_id first_prompt rows steps plan resume save_every save_minutes keep_last keep_best
    max_minutes stall_minutes show_every profile max_tokens_per_microbatch max_seqs gradient_checkpointing offload
    replicas sp tp gpu_memory""".split())
PHASES = " ".join(f"time/{name}" for name in "sample reward forward advantage update sync report save".split())
# section, also the name of its PNG -> title, then panels: (title, regular expressions of keys, options of the drawing)
SECTIONS = {
    "reward": ["Reward", ("fraction correct", "reward/correct eval/(.+/)?correct", {"low": 0}),
               ("reward", "reward/mean", {}),
               ("response length (tokens)", "rollout/length_mean eval/(.+/)?length_mean", {}),
               ("share of the responses cut at the limit", "rollout/truncated_frac", {"low": 0})],
    "policy": ["Policy", ("entropy (nats per token)", "policy/entropy", {}),
               ("KL(old policy || new) of an update", "policy/approx_kl", {}),
               ("share of the tokens clipped", "policy/clipfrac_low policy/clipfrac_high", {}),
               ("gradient norm", "policy/grad_norm", {}), ("KL to the reference", "policy/ref_kl", {})],
    "critic": ["Critic", ("explained variance", "critic/explained_var", {"floor": -1}),
               ("values", "critic/value_mean critic/value_min critic/value_max", {}), ("loss", "critic/loss", {})],
    "calibration": ["Critic calibration: does it expect what comes?"] + [
        (f"{name} quarter of the responses", f"critic/value_q{i} critic/return_q{i}", {})
        for i, name in enumerate(("1st", "2nd", "3rd", "4th"), 1)],
    "mismatch": ["Engine against trainer", ("|log-prob gap|, mean", "mismatch/logp_abs_mean", {"log": True}),
                 ("|log-prob gap| after the sync (canary)", "mismatch/canary", {"log": True}),
                 ("KL(engine || trainer)", "mismatch/kl", {})],
    "time": ["Time", ("seconds of a step, by phase", PHASES, {"stack": True})],
    "perf": ["Speed and memory", ("tokens per second, whole step", "perf/tokens_per_s", {"low": 0}),
             ("MFU of the update", "perf/mfu", {"low": 0}), ("memory at the peak (GB)", "perf/peak_gb", {"low": 0})],
}  # fmt: skip
LABELS = {f"critic/{name}_q{i}": name for name in ("value", "return") for i in range(1, 5)} | {
    f"critic/value_{name}": name for name in ("mean", "min", "max")} | {
    "reward/correct": "training batch", "eval/correct": "held-out problems", "rollout/length_mean": "training batch",
    "eval/length_mean": "held-out problems", "policy/clipfrac_low": "too low", "policy/clipfrac_high": "too high",
}  # fmt: skip
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a", "#F0E442"]  # Okabe and Ito's
DASHES = ["", "6 3", "2 2", "8 3 2 3"]

# ------------------------------------------------------------------------------------------------------------- reading


def parse(line: bytes) -> dict | None:
    """One line of a .jsonl file; None where it is torn: the run may be writing it, or its machine may have died."""
    try:
        row = json.loads(line.decode(errors="replace"))
        return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
    except (ValueError, RecursionError):
        return None


def number(x) -> float | None:
    """Five digits of it; None for what no curve can show."""
    return float(f"{x:.5g}") if isinstance(x, (int, float)) and abs(x) < 1e300 else None


def read_run(folder: Path, budget: int = BYTES, points: int = POINTS) -> dict:
    """Flags, curves and as many samples as fit into `budget` bytes."""
    try:
        config = json.loads((folder / "config.json").read_text(errors="replace"))
        config["prompts_per_step"]  # other folders have a config.json, too
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = f"{str(folder)!r} is no run folder (config.json: {getattr(error, 'strerror', None) or error}): expected "
        raise ValueError(text + "one that ppo.py wrote, with metrics.jsonl; give what was --out of the run") from error
    rows: dict[int, dict] = {}
    file = folder / "metrics.jsonl"
    for row in filter(None, map(parse, open(file, "rb"))) if file.exists() else ():
        rows[row["step"]] = rows.get(row["step"], {}) | row
    rows = [rows[step] for step in sorted(rows)]
    samples, total = read_samples(folder / "samples.jsonl", budget)
    spread = sorted(x for s in samples if "values" in s for x in s["values"][:2])
    peaks = sorted(max(map(abs, s["advantages"][:2])) for s in samples if "advantages" in s)
    return {
        "name": folder.resolve().name, "config": config, "rows": rows, "samples": samples, "total": total,
        "range": [spread[len(spread) // 50], spread[-1 - len(spread) // 50]] if spread else [0, 1],
        "scale": peaks[int(0.9 * len(peaks))] if peaks else 1,  # one odd token does not make the others pale
    } | thin(rows, points)  # fmt: skip


def thin(rows: list[dict], points: int) -> dict:
    """Curves of at most so many points, each the mean of `bucket` neighbouring steps: a power of two, so that those of
    a longer and a shorter run meet. What is measured rarely stays as it is."""
    last = max((row["step"] for row in rows), default=1)
    bucket = 1 << max(0, math.ceil(math.log2(max(1, last) / points)))
    curves: dict[str, dict[int, list]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (value := number(value)) is not None:
                place = row["step"] if key.startswith("eval/") else math.ceil(row["step"] / bucket) * bucket
                curves.setdefault(key, {}).setdefault(place, []).append(value)
    steps = sorted({place for curve in curves.values() for place in curve})
    means = {k: {place: number(sum(v) / len(v)) for place, v in curve.items()} for k, curve in curves.items()}
    return {"bucket": bucket, "steps": steps, "curves": {k: [c.get(s) for s in steps] for k, c in means.items()}}


def read_samples(file: Path, budget: int) -> tuple[list[dict], int]:
    """(samples, how many there are). The file of a long run is larger than memory: only the chosen lines are parsed."""
    places = [0]
    for line in open(file, "rb") if file.exists() else ():
        places.append(places[-1] + len(line))
    places.pop()
    with open(file if places else os.devnull, "rb") as lines:

        def pick(count: int) -> list[dict]:
            kept = []
            for i in range(count):
                lines.seek(places[round(i * (len(places) - 1) / max(1, count - 1))])
                kept.append(parse(lines.readline()))
            return [compact(row) for row in kept if row]

        few = pick(min(len(places), 40))
        wanted = min(len(places), int(budget / len(encode(few).encode()) * max(1, len(few))))
        while (used := len(encode(samples := pick(wanted)).encode())) > budget and wanted > 1:
            wanted = max(1, int(wanted * min(0.95, budget / used)))
    return samples, len(samples) if wanted == len(places) else len(places)


def clip(text: str, chars: int = CHARS) -> str:
    left_out = f"\n[... {len(text) - chars:,} characters left out of this page ...]\n"
    return text if len(text) < chars + 200 else text[: chars // 2] + left_out + text[-chars // 2 :]


def pack(numbers: list) -> list:
    """[least, largest, two base64 digits each: 4,096 steps between them]. A third of the bytes of decimal digits."""
    numbers = [number(x) or 0.0 for x in numbers]
    least, largest = min(numbers), max(numbers)
    places = [round((x - least) / ((largest - least) or 1) * 4095) for x in numbers]
    return [least, largest, "".join(BASE64[p >> 6] + BASE64[p & 63] for p in places)]


def compact(row: dict) -> dict:
    """A row of samples.jsonl as the page wants it: tokens joined by DEL; `response` is what comes before the tokens, or
    (with `whole`) all of it where tokens are not its parts, as with characters that several tokens make up."""
    response, prompt, tokens = str(row.get("response", "")), row.get("prompt", ""), row.get("tokens")
    if isinstance(prompt, list):
        prompt = [m if isinstance(m, dict) else {"content": m} for m in prompt]
        prompt = [[str(m.get("role", "")), clip(str(m.get("content")))] for m in prompt]
    sample = {"step": row["step"], "rest": {}, "prompt": prompt if isinstance(prompt, list) else clip(str(prompt))}
    known = "step prompt response tokens values advantages".split()
    for k, v in row.items():
        v = number(v) if isinstance(v, float) else v
        whole = v is None or isinstance(v, float) or isinstance(v, int) and abs(v) < 2**53
        sample["rest"] |= {} if k in known else {str(k): v if whole else clip(str(v), 500)}
    if isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens):
        for name in ("values", "advantages"):
            if isinstance(row.get(name), list) and len(row[name]) == len(tokens):
                sample[name] = pack(row[name][-TOKENS:])
        tokens = [token.replace("\x7f", "\ufffd") for token in tokens[-TOKENS:]]
        sample["tokens"] = "\x7f".join(tokens)
        for end in (tokens, tokens[:-1]):  # the last may be an end of sequence, which has no text in the response
            if response.endswith(text := "".join(end)):
                return sample | {"response": clip(response[: len(response) - len(text)])}
        sample["whole"] = True
    return sample | {"response": clip(response)}


def configuration(config: dict) -> dict:
    """Flags that make a run what it is, but for its seed. Folders of models may be named after run or seed."""
    same = {k: v for k, v in config.items() if k not in SAME}
    for key in {"model", "critic_model", "ref_model"} & set(same):
        text = str(same[key]).replace(str(config.get("out")) or "\0", "OUT")
        same[key] = re.sub(rf"(?i)(seed\W?|_s|-s){config.get('seed')}(?!\d)", r"\1*", text)
    return same


def group_runs(runs: list[dict]) -> list[dict]:
    """[{name, runs: places}]: runs that differ in nothing but their seed are one group."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(json.dumps(configuration(run["config"]), sort_keys=True), []).append(i)
    named = []
    for places in groups.values():
        names = [runs[i]["name"] for i in places]
        name = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", os.path.commonprefix(names)) or names[0]
        named.append({"name": f"{name} ({len(names)} seeds)" if len(names) > 1 else names[0], "runs": places})
    return named


def sections(keys: set[str]) -> tuple[list[dict], list[str]]:
    """(sections with the panels that have something to show, keys that are in none)."""
    found, shown = [], {"time/step"}
    for name, (title, *panels) in SECTIONS.items():
        filled = []
        for label, patterns, options in panels:
            mine = [k for p in patterns.split() for k in sorted(keys) if re.fullmatch(p, k)]
            filled += [{"title": label, "keys": mine} | options] if mine else []
            shown.update(mine)
        found += [{"name": name, "title": title, "panels": filled}] if filled else []
    return found, sorted(keys - shown)


def summary(run: dict) -> dict:
    """What the table at the top says of a run."""
    rows, config = run["rows"], run["config"]
    steps, evals = ([row for row in rows if key in row] for key in ("reward/mean", "eval/correct"))
    last, first, end = (steps or [{}])[-1], (evals or [{}])[0], (evals[1:] or [{}])[-1]
    return {
        "run": run["name"], "task": config.get("task"), "model": Path(str(config.get("model"))).name,
        "seed": config.get("seed"), "steps": rows[-1]["step"] if rows else 0, "reward": number(last.get("reward/mean")),
        "correct": number(last.get("reward/correct")), "held-out before": number(first.get("eval/correct")),
        "after": number(end.get("eval/correct")), "minutes": number(sum(row.get("time/step", 0) for row in rows) / 60),
    }  # fmt: skip


def encode(data) -> str:
    """JSON that cannot end the element that it stands in: no text of a sample is ever seen as HTML."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").encode(errors="replace").decode()  # lone halves of surrogate pairs become ?


def build(runs: list[dict], watch: int = 0) -> str:
    """The page. Its policy names its own script and style by their hashes and forbids everything else."""
    groups = group_runs(runs)
    shown, others = sections({key for run in runs for key in run["curves"]})
    fields = "name steps curves samples total range scale bucket".split()
    flags = [configuration(runs[group["runs"][0]]["config"]) for group in groups]
    table = [[name, *(str(known.get(name)) for known in flags)] for name in sorted(set().union(*flags))]
    data = {
        "runs": [{k: run[k] for k in fields} for run in runs], "table": [summary(run) for run in runs],
        "differs": [row for row in table if len(set(row[1:])) > 1], "groups": groups, "sections": shown,
        "others": others, "labels": LABELS, "colours": COLOURS, "dashes": DASHES, "watch": watch, "digits": BASE64,
    }  # fmt: skip
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (SCRIPT, STYLE)]
    policy = "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
    parts = {"POLICY": policy.format(*hashes), "STYLE": STYLE, "SCRIPT": SCRIPT, "DATA": encode(data)}
    return re.sub(r"@(POLICY|STYLE|SCRIPT|DATA)@", lambda found: parts[found[1]], PAGE)


def band(members: list[dict], key: str, weight: float) -> list[tuple]:
    """(step, mean, min, max over the runs) at the steps that all runs with this key have, of running means."""
    lines, weight = [], 0.0 if key.startswith("eval/") else weight
    for run in (run for run in members if key in run["curves"]):
        line, mean, total = {}, 0.0, 0.0
        for step, value in zip(run["steps"], run["curves"][key]):
            if value is not None:
                mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
                line[step] = mean / total  # corrected for the start
        lines.append(line)
    steps = sorted(set.intersection(*map(set, lines))) if lines else []
    columns = [(step, [line[step] for line in lines]) for step in steps]
    return [(step, sum(values) / len(values), min(values), max(values)) for step, values in columns]


def draw(runs: list[dict], folder: Path, weight: float) -> list[Path]:
    """A PNG for each section."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    groups, paths = group_runs(runs), []
    members, several = [[runs[i] for i in group["runs"]] for group in groups], len(groups) > 1
    for section in sections({key for run in runs for key in run["curves"]})[0]:
        panels = [(p, i) for p in section["panels"] for i in (range(len(groups)) if p.get("stack") else [-1])]
        down, across = math.ceil(len(panels) / 2), min(2, len(panels))
        figure = Figure(figsize=(5.5 * across, 3.1 * down))
        for place, (panel, of) in enumerate(panels, 1):
            axis = figure.add_subplot(down, across, place)
            for g, k in [(g, k) for g in range(len(groups)) for k in range(len(panel["keys"]))] if of < 0 else ():
                if points := band(members[g], key := panel["keys"][k], weight):
                    steps, mean, least, largest = zip(*points)
                    colour, dash = COLOURS[(g if several else k) % len(COLOURS)], DASHES[k % len(DASHES)].split()
                    label = [groups[g]["name"]] * several + [LABELS.get(key, key)] * (len(panel["keys"]) > 1)
                    style = (0, tuple(map(float, dash))) if dash else "-"
                    marker = "o" if key.startswith("eval/") else None
                    axis.plot(steps, mean, label=", ".join(label), color=colour, ls=style, marker=marker, ms=4)
                    axis.fill_between(steps, least, largest, alpha=0.18, linewidth=0, color=colour)
            if of >= 0:
                phases = {key: {step: y for step, y, *_ in band(members[of], key, weight)} for key in panel["keys"]}
                steps = sorted(set().union(*phases.values()))
                layers = [[phase.get(step, 0) for step in steps] for phase in phases.values()]
                axis.stackplot(steps, layers, labels=[key[5:] for key in phases], colors=COLOURS)
            name = f", {groups[of]['name']}" if of >= 0 and several else ""
            axis.set(title=panel["title"] + name, xlabel="PPO step", yscale="log" if panel.get("log") else "linear")
            axis.set_ylim(bottom=max(panel["floor"], axis.get_ylim()[0]) if "floor" in panel else panel.get("low"))
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8, frameon=False) if any(axis.get_legend_handles_labels()[1]) else None
        figure.suptitle(", ".join(group["name"] for group in groups), fontsize=10)
        figure.tight_layout()
        paths.append(folder / f"{section['name']}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="One page about runs: curves, critic, samples token by token.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; seeds of one become one band")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run folder")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="the curves as PNGs too, with matplotlib")
    parser.add_argument("--smooth", type=float, default=0.0, help="of the PNGs: 0 to 0.95; the page has a slider")
    parser.add_argument("--watch", action="store_true", help="write again when a run has gone on, until Ctrl-C")
    args = parser.parse_args()
    out, seen = args.out or args.runs[0] / "report.html", None
    files = [folder / f"{name}.jsonl" for folder in args.runs for name in ("metrics", "samples")]

    def once(watch: int) -> None:
        n = len(args.runs)
        runs = [read_run(folder, BYTES // n, min(POINTS, 8 * POINTS // n)) for folder in args.runs]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.new").write_text(build(runs, watch), encoding="utf-8")
        os.replace(f"{out}.new", out)  # a reader sees the old page or the new one
        paths = draw(runs, args.png, args.smooth) if args.png else []
        for run in map(summary, runs):
            ends = run["held-out before"], run["after"]
            text = "held-out accuracy {:.3f} before, {:.3f} after ".format(*ends) if None not in ends else ""
            print(f"{run['run']}: {text}{run['steps']} steps; {run['minutes']:.1f} minutes of PPO")
        print("\n".join(f"curves: {path}" for path in paths) + "\n" * bool(paths) + f"report: {out}", flush=True)

    try:
        while args.watch or seen is None:
            if (now := [(f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists()]) != seen:
                once(10 * args.watch)
            seen = now
            time.sleep(2 * args.watch)
    except KeyboardInterrupt:
        once(0)  # a page that no longer reloads itself
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#fff, #14171a); --fg: light-dark(#1c1f23, #e6e8ea);
--soft: light-dark(#596068, #a3abb3); --line: light-dark(#d9dde1, #343a40); --card: light-dark(#f6f7f8, #1c2024);
--accent: light-dark(#005a8d, #6cc0f0); } * { box-sizing: border-box } body { margin: 0; background: var(--bg);
color: var(--fg); font: 15px/1.5 system-ui, sans-serif } main { max-width: 1280px; margin: auto;
padding: 12px 16px 60px } h1 { font-size: 22px; margin: 8px 0; overflow-wrap: anywhere } h2 { font-size: 17px;
margin: 28px 0 8px } button, select, input { font: inherit; color: inherit; background: var(--card);
border: 1px solid var(--line); border-radius: 6px; padding: 4px 10px; min-height: 34px; max-width: 100% }
input[type=range] { padding: 0; accent-color: var(--accent) } input[type=checkbox] { min-height: 0 } button:hover {
border-color: var(--accent) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px } .bar {
display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center } .bar label { display: flex; gap: 6px;
min-width: 0; align-items: center; color: var(--soft) } select { min-width: 0; text-overflow: ellipsis } #tools {
position: sticky; top: 0; z-index: 2; background: var(--bg); padding: 8px 0; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px } td, th { padding: 3px 14px 3px 0;
text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) } th { color: var(--soft) } .grid {
display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 14px } figure {
margin: 0; padding: 10px; background: var(--card); border-radius: 8px; position: relative; min-width: 0 } figcaption {
font-weight: 600; font-size: 14px; overflow-wrap: anywhere } svg { display: block; width: 100% } svg.plot {
touch-action: pan-y; height: 200px } .legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px;
color: var(--soft); min-height: 18px } .legend span { display: inline-flex; align-items: center; gap: 5px } .key {
width: 24px; height: 8px } .tip { position: absolute; top: 100%; pointer-events: none; background: var(--bg);
font-size: 12px; border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; max-width: 92%; z-index: 1 }
text { fill: var(--soft); font-size:11px } .soft, dt { color: var(--soft) } .note { color: var(--soft); font-size:13px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; margin: 4px 0 12px;
background: var(--card); border-radius: 8px; padding: 10px } .think { border-left: 3px solid var(--line) }
.text [data-i] { border-radius: 2px } .text [data-i]:hover { outline: 2px solid var(--fg) } h3 { margin: 10px 0 0;
font-size: 13px; color: var(--soft); font-weight: 600 } #facts { display: flex; flex-wrap: wrap; gap: 2px 18px;
margin: 10px 0; font-size: 14px } #facts div { min-width: 0 } dl { margin: 0 } dt, dd { display: inline; margin: 0;
overflow-wrap: anywhere } dt::after { content: " " } #token { min-height: 24px; position: sticky; bottom: 0;
background: var(--bg); font-size: 14px; overflow-wrap: anywhere } .ramp { display: inline-block; width: 120px;
height: 12px; border: 1px solid var(--line) } #step { width: 180px } summary { cursor: pointer; margin: 24px 0 8px;
font-weight: 600 } section { scroll-margin-top: 70px } @media (max-width: 600px) { #tools { position: static } }
"""

SCRIPT = r"""
"use strict"; const D = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const S = { smooth: 0.5, singles: false, theme: "", run: 0, at: 0, show: "all", find: "", colour: "off", y: 0 };
try { Object.assign(S, JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}")); } catch { }
const keep = () => { S.y = scrollY; history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(S))); };
const make = (e, props, kids) => { for (const [k, v] of Object.entries(props))
    k.startsWith("on") ? e.addEventListener(k.slice(2), v) : e.setAttribute(k, v);
  e.append(...kids); return e; };  // strings become text nodes, never HTML
const h = (tag, props = {}, ...kids) => make(document.createElement(tag), props, kids);
const g = (tag, props, ...kids) => make(document.createElementNS("http://www.w3.org/2000/svg", tag), props, kids);
const fmt = v => v === null ? "\u2013" : typeof v !== "number" ? String(v) :
  v && Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4));
const within = (x, lo, hi) => Math.max(lo, Math.min(hi, x)), distinct = list => [...new Set(list)];
// ------------------------------------------------------------------------------------------------------------ curves
const ema = (ys, w) => { let a = 0, n = 0;
  return ys.map(y => y === null ? null : (a = w * a + (1 - w) * y, n = w * n + 1 - w, a / n)); };
function band(group, key, w) {  // mean, least and largest at the steps that all seeds with this key have
  const maps = group.runs.map(i => D.runs[i]).filter(r => r.curves[key]).map(r => {
    const ys = ema(r.curves[key], key.startsWith("eval/") ? 0 : w);
    return new Map(r.steps.map((x, i) => [x, ys[i]]).filter(p => p[1] !== null)); });
  return [...maps[0]?.keys() ?? []].filter(x => maps.every(m => m.has(x))).map(x => {
    const v = maps.map(m => m.get(x)), y = v.reduce((a, b) => a + b) / v.length;
    return { x, y, y0: y, lo: Math.min(...v), hi: Math.max(...v), n: v.length }; }); }
function ticks(lo, hi, log) {
  const raw = (hi - lo) / 4, ten = 10 ** Math.floor(Math.log10(raw));
  const by = log ? Math.ceil(raw) : ten * [1, 2, 5, 10].find(m => m * ten >= raw), from = Math.ceil(lo / by - 1e-9);
  return Array.from({ length: Math.floor(hi / by + 1e-9) - from + 1 }, (_, i) => +((from + i) * by).toPrecision(10)); }
function chart(panel, only) {  // a figure that draws itself again on .redraw(): the mean of `only` one group, or all
  const legend = h("div", { class: "legend" }), tip = h("div", { class: "tip", hidden: "" });
  const title = panel.title + (only && D.groups.length > 1 ? ", " + only.name : "");
  const box = h("figure", {}, h("figcaption", {}, title), legend, tip), L = 48, R = 10, T = 8, B = 22, H = 200;
  box.redraw = () => {
    const groups = only ? [only] : S.singles ? D.runs.map((r, i) => ({ name: r.name, runs: [i] })) : D.groups;
    const W = box.clientWidth - 20, several = groups.length > 1, stack = new Map();
    const curves = groups.flatMap((group, i) => panel.keys.map((key, k) => ({
      points: band(group, key, S.smooth), raw: band(group, key, 0), rare: key.startsWith("eval/"),
      name: [several && group.name, panel.keys.length > 1 && (D.labels[key] || key.replace(/^time\//, ""))]
        .filter(Boolean).join(", ") || group.name,
      colour: D.colours[(several ? i : k) % D.colours.length],
      dash: panel.stack ? "" : D.dashes[k % D.dashes.length] }))).filter(c => c.points.length);
    box.querySelector(".plot")?.remove(); legend.replaceChildren(); tip.hidden = true;
    if (!curves.length || W < 60) return;
    if (panel.stack) for (const p of curves.flatMap(c => c.points)) {
      p.lo = stack.get(p.x) || 0; p.y = p.hi = p.lo + p.y0; stack.set(p.x, p.hi); }
    const value = panel.log ? v => Math.log10(Math.max(v, 1e-12)) : v => v;
    const all = curves.flatMap(c => panel.stack ? c.points : [...c.points, ...c.raw]);
    const ends = list => list.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [x0, x1] = ends(all.map(p => p.x)), [y0, y1] =
      ends(all.flatMap(p => [value(p.lo), value(p.hi)]).filter(v => v > -12 || !panel.log));
    if (panel.stack || panel.low === 0) y0 = Math.min(0, y0);
    if ("floor" in panel) y0 = Math.max(y0, Math.min(panel.floor, y1));
    if (!(y0 <= y1)) [y0, y1] = [-12, -11];  // a logarithmic panel that has only zeros
    if (y1 - y0 < 1e-12 + 1e-9 * Math.abs(y1)) { y0 -= Math.abs(y0) / 2 || 0.5; y1 += Math.abs(y1) / 2 || 0.5; }
    if (x1 === x0) { x0 -= 1; x1 += 1; }
    if (panel.log) { y0 = Math.floor(y0); y1 = Math.ceil(y1); } else y1 += (y1 - y0) * 0.04;
    const X = x => L + (x - x0) / (x1 - x0) * (W - L - R), V = v => T + (1 - (v - y0) / (y1 - y0)) * (H - T - B);
    const Y = v => Math.min(H - B + 1, V(value(v)));
    const line = (points, f) => points.map(p => X(p.x).toFixed(1) + " " + Y(f(p)).toFixed(1)).join("L");
    const svg = g("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img",
      "aria-label": title + ": " + curves.map(c => c.name + " " + fmt(c.points.at(-1).y0)).join(", ") });
    for (const t of ticks(y0, y1, panel.log)) svg.append(
      g("line", { x1: L, x2: W - R, y1: V(t), y2: V(t), stroke: "var(--line)" }),
      g("text", { x: L - 5, y: V(t) + 4, "text-anchor": "end" }, panel.log ? "1e" + t : fmt(t)));
    for (const t of ticks(x0, x1).filter(Number.isInteger)) svg.append(
      g("text", { x: X(t), y: H - 6, "text-anchor": t === x1 ? "end" : "middle" }, String(t)));
    for (const { points, raw, rare, name, colour, dash } of curves) {
      const path = (d, more) => svg.append(g("path", { d: "M" + d, fill: "none", stroke: colour, ...more }));
      const many = points[0].n > 1, area = line(points, p => p.hi) + "L" + line(points.toReversed(), p => p.lo) + "Z";
      if (panel.stack) path(area, { fill: colour, stroke: "var(--card)", "stroke-width": 0.7 });
      else {
        if (many) path(area, { fill: colour, stroke: "none", opacity: 0.18, class: "band" });
        if (S.smooth > 0 && !rare) path(line(raw, p => p.y), { opacity: 0.3, class: "raw" });
        path(line(points, p => p.y), { "stroke-width": 1.8, "stroke-dasharray": dash, class: "curve" });
        for (const p of rare || points.length === 1 ? points : [])
          svg.append(g("circle", { cx: X(p.x), cy: Y(p.y), r: 3, fill: colour })); }
      const sign = { x1: 0, x2: 24, y1: 4, y2: 4, stroke: colour, "stroke-dasharray": dash };
      if (curves.length > 1 || many) legend.append(h("span", {}, g("svg", { class: "key", viewBox: "0 0 24 8" },
        g("line", { ...sign, "stroke-width": panel.stack ? 8 : 2 })), name)); }
    const xs = distinct(curves.flatMap(c => c.points.map(p => p.x))).sort((a, b) => a - b);
    const mark = g("line", { y1: T, y2: H - B, stroke: "var(--fg)", opacity: 0.5, visibility: "hidden" });
    let cursor = null; const show = x => {
      cursor = x; tip.hidden = x === null; mark.setAttribute("visibility", tip.hidden ? "hidden" : "visible");
      if (tip.hidden) return; mark.setAttribute("x1", X(x)); mark.setAttribute("x2", X(x));
      tip.replaceChildren(h("b", {}, "step " + x), ...curves.flatMap(c => c.points.filter(p => p.x === x).map(p =>
        h("div", {}, `${c.name}: ${fmt(p.y0)}` + (p.n > 1 && !panel.stack ? ` (${fmt(p.lo)} to ${fmt(p.hi)})` : "")))));
      const left = X(x) < W / 2;
      tip.style.left = left ? X(x) + 18 + "px" : ""; tip.style.right = left ? "" : W - X(x) + 18 + "px"; };
    const point = e => { const r = svg.getBoundingClientRect();
      const x = x0 + ((e.clientX - r.left) / r.width * W - L) / (W - L - R) * (x1 - x0);
      show(xs.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a)); };
    for (const name of ["pointermove", "pointerdown"]) svg.addEventListener(name, point);
    for (const name of ["pointerleave", "blur"]) svg.addEventListener(name, () => show(null));
    svg.addEventListener("keydown", e => { const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key]; if (!by) return;
      e.preventDefault(); show(xs[cursor === null ? (by < 0 ? xs.length - 1 : 0) :
        within(xs.indexOf(cursor) + by, 0, xs.length - 1)]); });
    svg.append(mark); box.append(svg); };
  return box; }
const redraw = () => document.querySelectorAll("figure").forEach(f => f.redraw());
// ----------------------------------------------------------------------------------------------------------- samples
const unpack = ([lo, hi, text]) => Array.from({ length: text.length / 2 }, (_, i) =>
  lo + (hi - lo) * (D.digits.indexOf(text[2 * i]) * 64 + D.digits.indexOf(text[2 * i + 1])) / 4095);
const words = s => s.whole || !s.tokens ? s.response : s.response + s.tokens.replaceAll("\x7f", "");
const kinds = { all: () => true, right: s => s.rest.correct >= 1, wrong: s => s.rest.correct < 1,
  cut: s => s.rest.finished === false };
const chat = s => typeof s.prompt === "string" ? [["", s.prompt]] : s.prompt; let hits = [];
function paint(x, run) {  // advantages: orange below 0, blue above; values: the larger, the greener
  const a = S.colour === "values" ? 0.04 + 0.6 * within((x - run.range[0]) / (run.range[1] - run.range[0] || 1), 0, 1) :
    0.6 * within(x / run.scale, -1, 1);
  return `rgb(${S.colour === "values" ? "0 158 115" : a < 0 ? "230 120 0" : "0 114 200"} / ${Math.abs(a)})`; }
function search() {
  const text = s => (words(s) + "\n" + chat(s).map(m => m[1]).join("\n")).toLowerCase(), find = S.find.toLowerCase();
  hits = D.runs[S.run].samples.filter(s => kinds[S.show](s) && (!find || text(s).includes(find))); sample(); }
function sample() {
  S.at = within(S.at, 0, hits.length - 1); keep();
  const run = D.runs[S.run], steps = distinct(hits.map(s => s.step)), s = hits[S.at];
  const mates = hits.filter(o => o.step === s.step);
  $("step").max = Math.max(0, steps.length - 1); $("step").value = s ? steps.indexOf(s.step) : 0;
  $("where").textContent = !s ? "no sample matches" :
    `step ${s.step}, sample ${mates.indexOf(s) + 1} of ${mates.length} (${hits.length} match)`;
  for (const id of ["facts", "view", "ramp", "token"]) $(id).replaceChildren(); if (!s) return;
  const { finished, ...rest } = s.rest, view = $("view"), think = h("div", { class: "text think", id: "thinking" });
  if (finished !== undefined) $("facts").append(h("b", {}, finished ? "finished" : "cut at the limit"));
  $("facts").append(...Object.entries(rest).map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, fmt(v)))));
  for (const [role, text] of chat(s))
    view.append(h("h3", {}, role ? "prompt: " + role : "prompt"), h("div", { class: "text" }, text));
  const both = ["values", "advantages"].filter(k => s[k]), read = both.map(k => unpack(s[k]));
  const numbers = read[both.indexOf(S.colour)], texts = s.tokens?.split("\x7f");
  const answer = h("div", { class: "text", id: "answer" });
  const parts = numbers ? [[s.whole ? "" : s.response, -1], ...texts.map((t, i) => [t, i])] : [[words(s), -1]];
  const full = parts.map(p => p[0]).join(""), asked = chat(s).at(-1)?.[1].trimEnd();
  const begun = full.includes("<think>") || asked?.endsWith("<think>");
  let end = full.lastIndexOf("</think>"), place = 0;
  end = end >= 0 ? end + 8 : begun ? full.length : 0;  // where the answer begins
  for (const [t, i] of parts) {
    const cut = within(end - place, 0, t.length); place += t.length;
    for (const [piece, box] of [[t.slice(0, cut), think], [t.slice(cut), answer]]) if (piece) {
      if (i < 0) { box.append(piece); continue; }
      const e = h("span", { "data-i": i }, piece); e.style.backgroundColor = paint(numbers[i], run); box.append(e); } }
  for (const [name, box] of [["thinking", think], ["answer", answer]]) {
    if (box.childNodes.length) view.append(h("h3", {}, name), box);
    for (const name of ["pointerover", "click"]) box.addEventListener(name, e => { const i = e.target.dataset.i;
      if (i !== undefined) $("token").textContent = `token ${+i + 1} of ${texts.length} ${JSON.stringify(texts[i])}: ` +
        both.map((k, j) => `${k.slice(0, -1)} ${+read[j][i].toPrecision(3)}`).join(", "); }); }
  if (!answer.childNodes.length) view.append(h("p", { class: "note" }, "no answer: the thinking has no end"));
  if (!numbers) return S.colour !== "off" && $("ramp").append(`this sample has no ${S.colour}`);
  const [lo, hi] = S.colour === "values" ? run.range : [-run.scale, run.scale], bar = h("span", { class: "ramp" });
  bar.style.backgroundImage = `linear-gradient(90deg, ${[0, 1, 2, 3, 4].map(i => paint(lo + (hi - lo) * i / 4, run))})`;
  $("ramp").append(`${+lo.toPrecision(3)} `, bar, ` ${+hi.toPrecision(3)}. Point at a token for its numbers` +
    (s.response && !s.whole ? "; only the last tokens have some" : "")); }
const go = by => { S.at += by; sample(); };
function leap(to) {  // to the first sample of the step in this place among the steps
  const steps = distinct(hits.map(s => s.step)), step = steps[within(to, 0, steps.length - 1)];
  S.at = Math.max(0, hits.findIndex(s => s.step === step)); sample(); }
const hop = by => leap(+$("step").value + by);
// -------------------------------------------------------------------------------------------------------------- page
const pick = (label, id, values, on) => h("label", {}, label, h("select", { id, onchange: on },
  ...values.map(([v, t]) => h("option", { value: v }, t))));
const button = (id, text, on) => h("button", { id, type: "button", onclick: on }, text);
const main = $("main"), title = D.groups.map(o => o.name).join(", "), heads = Object.keys(D.table[0]);
const seeds = D.groups.length < D.runs.length, some = D.runs.findIndex(r => r.samples.length);
const root = document.documentElement; document.title = title; root.style.colorScheme = S.theme;
const dark = () => S.theme ? S.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
main.append(h("h1", {}, title), h("div", { class: "wide", tabindex: 0 }, h("table", { id: "runs" },
  h("thead", {}, h("tr", {}, ...heads.map(k => h("th", {}, k)))),
  h("tbody", {}, ...D.table.map(r => h("tr", {}, ...heads.map(k => h("td", {}, fmt(r[k])))))))));
if (D.differs.length) main.append(h("p", { id: "differs" }, h("b", {}, "Differ in "),
  D.differs.map(([k, ...v]) => `${k}: ${v.join(" | ")}`).join("; ")));
main.append(h("div", { class: "bar", id: "tools" },
  h("label", {}, "smoothing", h("input", { type: "range", id: "smooth", min: 0, max: 0.95, step: 0.05, value: S.smooth,
    oninput: e => { S.smooth = +e.target.value; redraw(); keep(); } })),
  seeds ? h("label", {}, h("input", { type: "checkbox", id: "singles", ...(S.singles ? { checked: "" } : {}),
    onchange: e => { S.singles = e.target.checked; redraw(); keep(); } }), "each seed") : "",
  button("theme", "light / dark", () => { root.style.colorScheme = S.theme = dark() ? "light" : "dark"; keep(); }),
  some < 0 ? "" : button("jump", "samples", () => $("samples").scrollIntoView()), D.watch ? "live" : ""));
if (!D.runs.some(r => r.steps.length)) main.append(h("p", {}, "No steps yet: metrics.jsonl has no rows."));
for (const part of D.sections) main.append(h("section", { id: part.name }, h("h2", {}, part.title),
  h("div", { class: "grid" }, ...part.panels.flatMap(p => p.stack ? D.groups.map(o => chart(p, o)) : [chart(p)]))));
const coarse = Math.max(...D.runs.map(r => r.bucket)), last = i => D.runs[i].steps.at(-1);
main.append(h("p", { class: "note" },
  (seeds ? "A line is the mean of the seeds, its band reaches from the least to the largest of them. " : "") +
  (D.groups.some(o => distinct(o.runs.map(last)).length > 1) ? "Some seeds have fewer steps: means end where the " +
    "shortest does; \u201ceach seed\u201d shows the rest. " : "") +
  (coarse > 1 ? `Each point is the mean of ${coarse} steps.` : "")));
const grid = h("div", { class: "grid" }), unfold = () => { if (!grid.childNodes.length)
  grid.append(...D.others.map(k => chart({ title: k, keys: [k] }))); redraw(); };
if (D.others.length) main.append(h("details", { id: "others", ontoggle: unfold },
  h("summary", {}, `All other metrics (${D.others.length})`), grid));
if (some >= 0) {
  const left = D.runs.reduce((n, r) => n + r.total - r.samples.length, 0);
  if (!D.runs[S.run]?.samples.length) S.run = some;
  main.append(h("section", { id: "samples" }, h("h2", {}, "Samples"), h("div", { class: "bar" },
    pick("run", "run", D.runs.map((r, i) => [i, r.name]), e => { S.run = +e.target.value; search(); }),
    pick("show", "show", Object.keys(kinds).map(k => [k, k]), e => { S.show = e.target.value; S.at = 0; search(); }),
    pick("colour tokens by", "colour", [["off", "nothing"], ["values", "value"], ["advantages", "advantage"]],
      e => { S.colour = e.target.value; sample(); }),
    h("label", {}, "find", h("input", { type: "search", id: "find", value: S.find,
      oninput: e => { S.find = e.target.value; S.at = 0; search(); } }))),
    h("div", { class: "bar" }, button("back", "\u2190 step", () => hop(-1)), h("input", { type: "range", id: "step",
      min: 0, "aria-label": "step of the samples", oninput: e => leap(+e.target.value) }),
      button("on", "step \u2192", () => hop(1)), button("prev", "\u2190 sample", () => go(-1)),
      button("next", "sample \u2192", () => go(1)), h("span", { id: "where", "aria-live": "polite" })),
    h("p", { class: "note" }, "Keys: left and right for samples, with Shift for steps." + (left ?
      ` ${left} samples are left out of this page, evenly over the steps; samples.jsonl has all.` : "")),
    h("dl", { id: "facts" }), h("div", { id: "ramp", class: "note" }), h("div", { id: "view" }),
    h("div", { id: "token" })));
  for (const k of ["run", "show", "colour"]) $(k).value = S[k];
  const y = S.y; search(); S.y = y;
  addEventListener("keydown", e => { const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    const mine = e.ctrlKey || e.metaKey || e.altKey || e.target.closest?.("input, select, svg");
    if (by && !mine) (e.shiftKey ? hop : go)(by); }); }
redraw(); scrollTo(0, S.y); let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
const again = () => { if (document.activeElement?.id !== "find") { keep(); location.reload(); } };
if (D.watch) setInterval(again, 1000 * D.watch);
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="@POLICY@">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>report</title><style>@STYLE@</style></head>
<body><main id="main"></main><script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script></body></html>
"""

if __name__ == "__main__":
    main()
