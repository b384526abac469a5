"""What a user reads before the first step: --help, the error without a model, and the line that says whether a run will
fit into memory. Also that the first GPU command of the README does fit."""

import contextlib
import io
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import toy
from transformers import AutoConfig, GPT2Config

import ppo
from tools import plan

ROOT = Path(__file__).resolve().parent.parent
GB = 2**30
# as published; 494,032,768 parameters
QWEN_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
POLICY = 494_032_768
CRITIC = POLICY + 896 + 1  # a value head in place of the tied one
UNITS = re.compile(
    r"\b(steps?|minutes?|tokens?|GB|bytes|GPUs?|answers?|prompts?|rows?|checkpoints?|nats?|copies|"
    r"reward|ratio|\d to \d|\d or more|above \d)\b"
)


@pytest.fixture
def half_b(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_HALF_B))
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------- --help


@pytest.fixture
def shown(monkeypatch) -> str:
    """With the boxes that a terminal shows."""
    monkeypatch.setenv("COLUMNS", "80")
    said = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(said, encoding="utf-8", write_through=True)):
        with pytest.raises(SystemExit) as ended:
            ppo.parse_args(["--help"])
        assert ended.value.code == 0
        return said.getvalue().decode()


def help_of_flags(shown: str) -> dict[str, str]:
    """flag -> its text; in the order of the page."""
    found = {}
    name = ""
    for line in shown.splitlines():
        flag = re.match(r"│ --(\w+)", line)
        if flag:
            name = flag[1]
            found[name] = ""
        beside = line[23:25] == "  "  # the texts' column begins here; a long flag has its own line
        if line.startswith("│") and name and beside:
            found[name] += line[24:].rstrip("│")
    return {name: " ".join(text.split()) for name, text in found.items()}


def test_help_begins_with_what_a_newcomer_needs(shown):
    """Guards the page against --model somewhere in its middle, and no command to start from."""
    before, _, boxes = shown.partition("╭")
    flags = re.findall(r"^│ --(\w+)", boxes, re.MULTILINE)
    assert flags[:2] == ["model", "task"]
    assert "torchrun --nproc_per_node 1 ppo.py --model" in before
    assert "--plan N_GPUS GB" in before and "python ppo.py --plan 4 80 --model" in before
    assert max(map(len, before.splitlines())) <= 90


def test_every_flag_is_explained(shown):
    """Guards a flag without words, one without a unit or a range, a text that is cut, and a class of flags that has no
    box."""
    boxed = [flag.name for box in ppo.TITLES for flag in fields(box)]
    assert sorted(boxed) == sorted(flag.name for flag in fields(ppo.Args))
    assert "Flags" not in shown  # names of classes
    texts = help_of_flags(shown)
    assert list(texts) == boxed
    for flag in fields(ppo.Args):
        text, default, _ = texts[flag.name].partition("(default:")
        assert default, f"--{flag.name}: {text} is cut"
        words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\{.*?\}|--\w+|\b[A-Z]{3,5}\b", "", text))
        assert len(words) > 2, f"--{flag.name}: {text}"
        if flag.type in (int, float, int | None, float | None):
            assert UNITS.search(text), f"--{flag.name} says neither unit nor range: {text}"
    assert all(len(line) <= 80 for line in shown[shown.index("╭") :].splitlines())


def test_a_missing_model_is_said():
    """Guards the first mistake of all: a traceback of transformers about an empty name."""
    with pytest.raises(SystemExit) as ended:
        ppo.parse_args(["--task", "countdown"])
    assert "--model is missing" in ended.value.code


# ----------------------------------------------------------------------------------- the line at the start of a run


def memory_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("memory: ")]


def test_a_run_says_at_its_start_whether_it_fits(tmp_path, capsys, monkeypatch):
    """Guards the one line, of which the machine's memory is a part; and a run that a plan stops."""
    toy.run(f"{tmp_path}/run", "--steps", "1", "--prompts_per_step", "64")
    said = capsys.readouterr().out
    (line,) = memory_lines(said)
    parts = r"a process needs \S+ GB while sampling, \S+ GB while updating, \S+ GB while saving, of \S+ GB"
    machine = f"the machine 1\\.\\d\\d GB of {plan.machine_memory():.2f} GB"
    assert re.fullmatch(f"memory: {parts}; {machine}: fits", line)
    assert said.index(line) < said.index("plan: ")

    monkeypatch.setattr(plan, "machine_memory", lambda: plan.LIBRARIES + 0.001)
    rows = toy.run(f"{tmp_path}/tight", "--steps", "1", "--prompts_per_step", "64")
    (line,) = memory_lines(capsys.readouterr().out)
    assert ": does not fit: while " in line and len(rows) == 1


def job(config, **changed) -> plan.Job:
    """Of the run that the README begins with, on a card of 24 GB."""
    flags = "--model x --prompts_per_step 64 --samples_per_prompt 4 --gpu_memory 0.25".split()
    args = ppo.parse_args(flags)
    for name, value in changed.items():
        setattr(args, name, value)
    return plan.make_job(**plan.facts(config, config, args, 1, 24.0, cuda=True))


def test_the_line_of_a_card(half_b):
    """Guards the line's numbers, those of the machine by hand, and that each shortage is said with a way out."""
    config = AutoConfig.from_pretrained(half_b)
    fits = plan.fits_line(job(config), 1, 64.0)
    totals = plan.part_totals(job(config))
    need = 1 + 12 * (POLICY + CRITIC) / GB  # libraries; what a checkpoint is written from
    assert fits == (
        f"memory: a GPU needs {totals['sampling']:.2f} GB while sampling, "
        f"{totals['updating']:.2f} GB while updating, of 24.00 GB; "
        f"the machine {need:.2f} GB of 64.00 GB: fits"
    )
    # 16 bytes of each parameter of an offloaded model: weights, gradients, two states of AdamW
    moved = plan.machine_need(job(config, offload=("critic",)))
    assert moved == pytest.approx(need + 16 * CRITIC / GB)
    assert plan.fits_line(job(config), 4, 64.0).endswith(f"{4 * need:.2f} GB of 64.00 GB: fits")

    line = plan.fits_line(job(config, gpu_memory=0.5), 1, 64.0)
    assert re.search(r": does not fit: while sampling: --gpu_memory at most 0\.\d+$", line)
    line = plan.fits_line(job(config), 1, 8.0)
    assert line.endswith(": does not fit: the machine: one with more memory")
    line = plan.fits_line(job(config, gpu_memory=0.05), 1, 64.0)
    assert ": does not fit: the KV cache holds no sequence" in line
    alone = plan.fits_line(job(config, gpu_memory=0.5), 1, 4.0, eval_only=True)
    assert "updating" not in alone and alone.endswith("the machine 1.00 GB of 4.00 GB: fits")


def test_a_run_without_a_plan_goes_on():
    """Guards runs of models that the plan does not know, or cannot even read."""
    args = ppo.parse_args(["--model", "x"])
    other = GPT2Config()
    line = plan.line_of_run(other, other, args, 1, cuda=False)
    assert line.startswith("memory: no plan for this architecture, gpt2: ")
    assert plan.line_of_run(None, None, args, 1, cuda=False).startswith("memory: no plan: ")


@pytest.mark.parametrize(
    "entry, file, limit",
    [
        ("0::/", "memory.max", 3 * GB),
        ("0::/system.slice/job", "system.slice/memory.max", 3 * GB),  # of the folder above
        ("4:memory:/docker/x", "memory/memory.limit_in_bytes", 3 * GB),
        ("0::/", "memory.max", "max"),
    ],
)
def test_limits_of_containers_count(entry, file, limit, tmp_path):
    """Guards a plan with the memory of the whole machine where a container or a batch system gives a part of it."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:        8388608 kB\nMemFree: 1 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:name=systemd:/\n{entry}\n")
    (tmp_path / "cgroup" / file).parent.mkdir(parents=True)
    (tmp_path / "cgroup" / file).write_text(f"{limit}\n")
    found = plan.machine_memory(tmp_path / "proc", tmp_path / "cgroup")
    assert found == (8 if limit == "max" else 3)


# --------------------------------------------------------------------------------------------- the first GPU command


def first_gpu_command(text: str) -> list[str]:
    """The flags of ppo.py in the first command on one GPU."""
    command = re.search(r"^ +torchrun --nproc_per_node 1 (?:.*\\\n)*.*", text, re.MULTILINE)[0]
    program, _, flags = command.replace("\\\n", " ").partition(" ppo.py ")
    return shlex.split(flags)


@pytest.mark.parametrize("where", ["README.md", "--help"])
def test_the_first_gpu_command_fits(where, half_b):
    """Guards the first thing that somebody with one card of 24 GB does: it must fit with some air, evaluate and save."""
    text = ppo.HELP if where == "--help" else (ROOT / where).read_text()
    args = ppo.parse_args(first_gpu_command(text))
    assert args.model == "Qwen/Qwen2.5-0.5B-Instruct" and args.eval_every
    assert args.save_every or where == "--help"
    args.model = str(half_b)
    configs = ppo.check(args, 1, only_plan=True)
    found = plan.memory_plan(**plan.facts(*configs, args, 1, 24.0, cuda=True))
    assert "\nfits in 24 GB" in found.text, found.text
    assert max(found.totals.values()) < 22
