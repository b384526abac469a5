"""What a run leaves is an ordinary model: it loads anywhere, and a fresh engine answers with it as
the trainer did.

Three runs, each made once, when a test first wants it. Two are the same one, on one rank and on two ("tied1", "tied2");
they sample with plain PyTorch, so that every answer has a second opinion. The third, on two ranks, has an untied head,
a critic of another architecture, and vLLM.
"""

import functools
import json
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402, I001  (first: the guard for the name `kernels`)

import launch  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForTokenClassification,
)

import rewards  # noqa: E402
import rollout  # noqa: E402
from infra import watchdog  # noqa: E402

EVAL_ROWS = 6
MOST = 24  # tokens of an answer
ASK = f"""--task countdown3 --max_prompt_tokens 64 --max_new_tokens {MOST} --eval_rows {EVAL_ROWS}
    --eval_every 1 --eval_temperature 0""".split()
LEARN = """--prompts_per_step 8 --samples_per_prompt 2 --max_tokens_per_microbatch 400 --steps 2
    --no-gradient_checkpointing --save_every 1 --keep_best eval/length_mean --lr 1e-2
    --critic_lr 1e-2 --entropy_coef 0.1""".split()
RUNS = ["tied1", "tied2", "untied2"]  # the number of ranks
ASKED = {"tied2": 1, "untied2": 2}  # the step whose checkpoint a fresh engine gets


# ---------------------------------------------------------------------- python tests/test_export.py


def main(*jobs: str) -> None:
    """Each job is the flags of a run, as JSON, done one after another. Beside the folder of each
    run: the ids of every prompt and answer. Rewards and verdicts depend on every letter of an
    answer, so that there is something to learn."""

    def letters(text: str, row: dict, rules=None) -> dict:
        right = zlib.crc32(text.encode()) % 2
        return {
            "reward": len(text) / 100 + right,
            "correct": float(right),
            "status": "ok" if right else "wrong",
        }

    rewards.REWARDS["countdown"] = letters
    evaluate, records = ppo.evaluate, rollout.records
    for flags in map(json.loads, jobs):
        args = ppo.parse_args(flags)

        def write(rows, samples, out=args.out):
            if watchdog.RANK == 0:
                pairs = [[row["ids"], s.ids] for row, s in zip(rows, samples)]
                with open(f"{out}.ids.jsonl", "a") as file:
                    file.write(json.dumps(pairs) + "\n")

        def evaluated(setup, write=write):
            metrics, answers = evaluate(setup)
            write(answers.rows, answers.samples)
            return metrics, answers

        def recorded(step, rows, samples, *more, write=write, **numbers):
            write(rows, samples)
            return records(step, rows, samples, *more, **numbers)

        ppo.evaluate, rollout.records = evaluated, recorded
        ppo.train(args)


# -------------------------------------------------------------------------------------------- runs


def run(*jobs: list, ranks: int = 1) -> None:
    words = [json.dumps([*map(str, job)]) for job in jobs]
    launch.run("tests/test_export.py", *words, ranks=ranks).good()


def many_ends(path: str, to: Path) -> Path:
    """A copy whose generation_config.json names every eighth token as one that ends: answers have
    all lengths, and a checkpoint that forgets these names is heard."""
    shutil.copytree(path, to)
    file = to / "generation_config.json"
    config = json.loads(file.read_text())
    size = json.loads((to / "config.json").read_text())["vocab_size"]
    file.write_text(
        json.dumps(config | {"eos_token_id": [config["eos_token_id"], *range(5, size, 8)]})
    )
    return to


def small_critic(vocabulary: int, to: Path) -> Path:
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_labels=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForTokenClassification(small).save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, tiny_untied) -> dict[str, Path]:
    """What the runs start from: "tied", "untied", "critic"."""
    at = tmp_path_factory.mktemp("models")
    tied = many_ends(tiny, at / "tied")
    size = json.loads((tied / "config.json").read_text())["vocab_size"]
    return {
        "tied": tied,
        "untied": many_ends(tiny_untied, at / "untied"),
        "critic": small_critic(size, at / "critic"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models) -> Callable[[str], Path]:
    """trained(name): the folder of one of RUNS, made when it is first asked for."""
    at = tmp_path_factory.mktemp("trained")
    plain = ["--engine", "torch", "--model", models["tied"]]
    other = ["--model", models["untied"], "--critic_model", models["critic"]]
    own = {"tied1": plain, "tied2": plain, "untied2": other}

    @functools.cache
    def make(name: str) -> Path:
        run([*ASK, *LEARN, *own[name], "--out", at / name], ranks=int(name[-1]))
        return at / name

    return make


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, trained) -> Path:
    """The folder of evaluations of these checkpoints by new engines, vLLM; all in one process."""
    at = tmp_path_factory.mktemp("fresh")
    jobs = []
    for name, step in ASKED.items():
        policy = trained(name) / "checkpoints" / f"step_{step}" / "policy"
        jobs.append([*ASK, "--steps", 0, "--model", policy, "--out", at / name])
    run(*jobs)
    return at


def ids_of(out: Path) -> list[list]:
    """What `main` has written: lists of (prompt, answer) pairs."""
    return launch.read_lines(f"{out}.ids.jsonl")


def greedy(out: Path, step: int) -> list:
    """(prompt, answer) pairs of the evaluation after `step` of a run."""
    return [pairs for pairs in ids_of(out) if len(pairs) == EVAL_ROWS][step]


def load(folder: Path, kind):
    """The model as transformers loads it; all that it says about its keys must be empty."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), (folder, info)
    assert all(p.dtype == torch.float32 for p in model.parameters()), folder
    return model.eval()


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File -> its tensors."""
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def surprise(model, prompt: list[int], answer: list[int]) -> float:
    """How far, at most, an answer's token is from the one that the model itself holds likeliest, in
    nats. 0: greedy decoding gives this answer, token for token; what is above can only be a tie
    between engines."""
    logits = (
        model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    )
    return (logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]).max().item()


TIE = 1e-4  # nats: engines agree within 1e-6; a wrong weight shows as 0.1 and more


@pytest.mark.parametrize("name", RUNS)
def test_transformers_loads_every_checkpoint(models, trained, name):
    """Guards the export: wrong or missing keys, a head that was untied or tied on the way, rounded
    weights, weights that were not trained, an index that names other files than there are, a critic
    without its head, links that lead nowhere."""
    before = load(models[name[:-1]], AutoModelForCausalLM)
    checkpoints = trained(name) / "checkpoints"
    folders = [checkpoints / step for step in ("step_1", "step_2", "latest", "best")]
    assert folders[2].resolve() == folders[1] and folders[3].resolve() in folders[:2]
    for folder in folders:
        policy = load(folder / "policy", AutoModelForCausalLM)
        critic = load(folder / "critic", AutoModelForTokenClassification)
        assert (policy.lm_head.weight is policy.model.embed_tokens.weight) == name.startswith(
            "tied"
        )
        assert (
            type(critic).__name__
            == ("Llama" if name == "untied2" else "Qwen2") + "ForTokenClassification"
        )
        assert not any(a.equal(b) for a, b in zip(before.parameters(), policy.parameters()))
        assert critic.score.weight.any() and critic.config.num_labels == 1
        for model in (policy, critic):  # what vLLM reads
            assert model.config.architectures == [type(model).__name__]
        for part in ("policy", "critic"):
            files = shards(folder / part)
            if name.endswith("2"):
                assert list(files) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
                index = json.loads((folder / part / "model.safetensors.index.json").read_text())
                assert index["weight_map"] == {
                    key: file for file, keys in files.items() for key in keys
                }
                sizes = [sum(x.numel() for x in tensors.values()) for tensors in files.values()]
                assert min(sizes) > 0.3 * max(sizes)  # no rank writes nearly all
            else:
                assert list(files) == ["model.safetensors"]
        assert AutoTokenizer.from_pretrained(folder / "policy").decode([40, 41]) != ""


def check_answers(policy, pairs: list) -> None:
    """They are those of `policy`, in plain transformers, and end where they should."""
    ends = set(policy.generation_config.eos_token_id)
    for prompt, answer in pairs:
        assert surprise(policy, prompt, answer) < TIE
        assert (answer[-1] in ends) or len(answer) == MOST
        assert not ends & set(answer[:-1])


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_what_answered(models, trained, name):
    """Guards what is exported against what was trained: weights of another step, a critic in the
    policy's place, a generation_config.json that was lost. The trainer's answers after each step
    are those of plain transformers with that checkpoint. The untrained model says other things."""
    ran = trained(name)
    before = load(models[name[:-1]], AutoModelForCausalLM)
    for step in (1, 2):
        policy = load(ran / "checkpoints" / f"step_{step}" / "policy", AutoModelForCausalLM)
        assert policy.generation_config.eos_token_id == before.generation_config.eos_token_id
        told = greedy(ran, step)
        check_answers(policy, told)
        assert max(surprise(before, prompt, answer) for prompt, answer in told) > 100 * TIE


@pytest.mark.parametrize("name", ASKED)
def test_a_fresh_engine_answers_as_the_trainer_did(trained, fresh, name):
    """Guards the files for vLLM: index, config.json, generation_config.json, tokenizer. Trainer and
    fresh engine agree token for token; where they do not, both tokens must be equally likely."""
    ran, asked = trained(name), fresh / name
    step = ASKED[name]
    told, answered = greedy(ran, step), greedy(asked, 0)
    assert [prompt for prompt, _ in told] == [prompt for prompt, _ in answered]
    policy = load(ran / "checkpoints" / f"step_{step}" / "policy", AutoModelForCausalLM)
    check_answers(policy, answered)
    if told == answered:  # no tie among them: then all that is said about them is equal, too
        last, first = launch.metrics(ran)[step], launch.metrics(asked)[0]
        ours = {key: value for key, value in last.items() if key.startswith("eval/")}
        assert len(ours) >= 2 and ours == {
            key: value for key, value in first.items() if key.startswith("eval/")
        }
    assert len(launch.read_lines(asked / "samples.jsonl")) == EVAL_ROWS


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_the_critic_says_what_it_said(trained, name):
    """Guards the critic's export, head and size: the values that step 2 began with are those of the
    checkpoint of step 1, on the same answers."""
    ran = trained(name)
    critic = load(ran / "checkpoints" / "step_1" / "critic", AutoModelForTokenClassification)
    pairs = [pairs for pairs in ids_of(ran) if len(pairs) > EVAL_ROWS][1]
    values = torch.cat(
        [critic(torch.tensor([p + a[:-1]])).logits[0, len(p) - 1 :, 0] for p, a in pairs]
    )
    row = launch.metrics(ran)[2]
    for key in ("mean", "min", "max"):
        assert row[f"critic/value_{key}"] == pytest.approx(
            getattr(values, key)().item(), abs=1e-5
        ), key
    assert values.std() > 1e-3


def test_two_ranks_write_what_one_does(trained):
    """Guards the gathering of shards: transposed, of another rank, of a layer before its update; of
    weights and of AdamW's moments. (Adam divides a gradient by its own size: where that is nearly
    0, nothing is known of the step.)"""
    for part in ("policy", "critic"):
        one, two = ({}, {})
        for name, all_of in (("tied1", one), ("tied2", two)):
            at = trained(name) / "checkpoints" / "step_1"
            for tensors in (
                shards(at / part) | {f: load_file(at / f) for f in optimizer_files(at, part)}
            ).values():
                all_of |= tensors
        assert one.keys() == two.keys()
        moments = {key for key in one if key.endswith((".exp_avg", ".exp_avg_sq", ".step"))}
        kinds = ("exp_avg", "exp_avg_sq", "step")
        assert {f"{key}.{kind}" for key in one.keys() - moments for kind in kinds} == moments
        for key in one:
            gap = (one[key] - two[key]).abs()
            if key not in moments:  # after one step exp_avg is a tenth of the gradient
                gradient = one[
                    f"{key}.exp_avg"
                ].abs()  # 0: of a critic's body, below a head of zeros
                sure = (gradient > 1e-7) | (gradient == 0)
                assert gap.max() < 0.01 and sure.float().mean() > 0.5, key
                gap = gap[sure]
            assert gap.max() < 1e-6, (part, key, gap.max())


def optimizer_files(at: Path, part: str) -> list[str]:
    return sorted(file.name for file in at.glob(f"{part}.optimizer*.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
