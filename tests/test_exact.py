"""Every way to train equals the plain one, and sequences of a packed row do not know of each
other."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import exact
import launch
import pytest
import torch
from transformers.utils import is_flash_attn_2_available

import data
import kernels
from infra import dist, models

# ----------------------------------------------------------------------- every way is the plain one


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    exact.make_folders(root)
    return root


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, exact.Result]:
    return {case: exact.plain(folders, case) for case in exact.CASES}


@pytest.fixture(scope="module")
def found(folders) -> Callable:
    """found(world): what each rank of a run of all ways of so many ranks has found."""

    @functools.cache
    def of(world: int) -> list[dict[tuple[str, str], exact.Result]]:
        if world == 1:
            return [exact.run_ways(folders, 1)]
        launch.run("tests/exact.py", folders, ranks=world).good()
        ranks = [torch.load(folders / f"{world}-{rank}.pt") for rank in range(world)]
        return [{key: exact.Result(*value) for key, value in rank.items()} for rank in ranks]

    return of


def pairs(
    found: Callable, expected: dict, way: exact.Way
) -> list[tuple[str, exact.Result, exact.Result]]:
    """(case, what a rank has, the plain result): all ranks must have it, and so replicas may not
    drift apart."""
    cases = exact.CASES_OF_4 if way.world == 4 else exact.CASES
    return [
        (case, rank[way.name, case], expected[case]) for rank in found(way.world) for case in cases
    ]


def far(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The tensors whose relative error (in norms) is not below 1e-4, nan included."""
    assert got.keys() == wanted.keys()
    errors = {name: ((got[name] - x).norm() / x.norm()).item() for name, x in wanted.items()}
    return {name: error for name, error in errors.items() if not error < 1e-4}


every_way = pytest.mark.parametrize("way", exact.WAYS, ids=lambda way: way.name)


def test_the_comparison_is_a_hard_one(expected):
    """Guards the tests below: ranks that always have work, one micro-batch, a clip that is never
    active, weights that hardly move or models that care for no other token would let most faults
    through."""
    fed = [n - 1 for n in exact.LENGTHS]
    plans = {rows: data.plan_microbatches(fed, exact.BUDGET, rows) for rows in (1, 2, 4)}
    assert all(len(plan[0]) > 1 for plan in plans.values())
    last = [fed[b] for b in exact.UPDATES[1]]
    assert all([] in sum(data.plan_microbatches(last, exact.BUDGET, rows), []) for rows in (2, 4))
    assert min(exact.LENGTHS) == 2
    for case, plain in expected.items():
        assert min(plain.norms) > 4 * exact.MAX_NORM, case
        assert all(
            (gradient.norm() > 1e-3).all()
            for update in plain.gradients
            for gradient in update.values()
        ), case


@every_way
def test_a_way_is_what_its_name_says(found, expected, way):
    """Guards a flag that is ignored: every comparison below would then hold, and mean nothing."""
    shape = (way.replicas, way.world // way.replicas)
    mesh = shape if way.replicas > 1 else shape[1:] if way.world > 1 else ()
    wanted = {
        "mesh": mesh,
        "slices": way.sp,
        "checkpointing": way.checkpointing,
        "offload": {way.offload},
    }
    wanted["attention"] = way.attention
    for case, got, _ in pairs(found, expected, way):
        assert got.made == wanted, case


@every_way
def test_outputs_are_those_of_plain_models(found, expected, way):
    """Guards log-probs, entropies and values, before and after an update: sequences that see each
    other, slots and targets on the wrong rank, a temperature lost, weights that are stale after a
    step."""
    for case, got, plain in pairs(found, expected, way):
        for x, y in zip(got.outputs, plain.outputs, strict=True):
            assert (x - y).abs().max() < 1e-5, case


@every_way
def test_gradients_are_those_of_plain_models(found, expected, way):
    """Guards sums over ranks, micro-batches and replicas: a mean instead, a part counted twice, a
    tied embedding that misses its second half, layers that are recomputed with other inputs."""
    for case, got, plain in pairs(found, expected, way):
        for x, y in zip(got.gradients, plain.gradients, strict=True):
            assert not far(x, y), case


@every_way
def test_new_weights_are_those_of_plain_models(found, expected, way):
    """Guards the step: a clip with one rank's norm, a rate that is not set, gradients left over
    from the last update, replicas that drift apart, a weight lost on its way to the engine."""
    for case, got, plain in pairs(found, expected, way):
        assert torch.allclose(torch.tensor(got.norms), torch.tensor(plain.norms), rtol=1e-5), case
        assert got.weights.keys() == plain.weights.keys()
        for name, weight in plain.weights.items():
            assert (got.weights[name] - weight).abs().max() < 1e-5, (case, name)


# ---------------------------------------------------------------------------------- Liger's patches


@pytest.fixture(scope="module")
def liger(folders) -> dict[str, exact.Patched]:
    """From a real start of Python: Triton reads TRITON_INTERPRET when it is imported, and what
    tests/launch.py forks has imported it."""
    command = [sys.executable, exact.__file__, str(folders)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return {case: exact.Patched(*value) for case, value in torch.load(folders / "liger.pt").items()}


@pytest.mark.parametrize("case", exact.ARCHITECTURES)
def test_ligers_layers_are_the_plain_ones(liger, case):
    """Guards norms and MLPs that differ from the model's own (another epsilon, a rounding, a
    gradient), in Triton's interpreter, and a patch that does nothing."""
    patched = liger[case]
    layers = exact.SIZES["num_hidden_layers"]
    assert patched.said == "RMSNorm, SwiGLU"
    norms = (4 if "qwen3" in case else 2) * layers + 1  # Qwen3 has them on queries and keys as well
    assert (
        patched.classes.count("LigerRMSNorm") == norms
        and patched.classes.count("LigerSwiGLUMLP") == layers
    )
    assert not any(
        name.endswith(("RMSNorm", "MLP")) and "Liger" not in name for name in patched.classes
    )
    assert (patched.logits[1] - patched.logits[0]).abs().max() < 1e-5
    assert not far(*patched.gradients[::-1])


# ----------------------------------------------------------------- sequences of a row are strangers

SEQUENCES = [9, 2, 17, 4]  # their lengths


def load(folder: Path, attention: str, training: bool = True):
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("the package flash_attn is not installed, or finds no GPU")
    kernels.setup("qwen2", liger=False, progress=False, bf16=False, attention=attention)
    accelerator, _ = dist.start_ranks(bf16=False, sp=1)
    model = models.load_policy(str(folder), kernels.LogprobHead, accelerator, attention=attention)
    return model.train(training)


def make_ids(changed: int | None = None) -> torch.Tensor:
    """The same ids every time, but for those of one sequence, which are all different."""
    ids = torch.randint(
        1, 61, (len(SEQUENCES), max(SEQUENCES)), generator=torch.Generator().manual_seed(5)
    )
    if changed is not None:
        ids[changed] = 61 - ids[changed]
    return ids


def outputs(model, changed: int | None = None, forward=None) -> list[torch.Tensor]:
    """(2, tokens) log-probs and entropies of each sequence; all of them are in one row."""
    ids = make_ids(changed)
    p = kernels.pack(
        ids, torch.ones_like(ids, dtype=torch.bool), SEQUENCES, list(range(len(SEQUENCES)))
    )
    both = (forward or (lambda model, p: kernels.policy_forward(model, p, 0.7)))(model, p)
    return torch.stack(list(both)).split([n - 1 for n in SEQUENCES], dim=1)


def leak(model, forward=None) -> float:
    """By how much sequences' numbers move when another one in their row gets other tokens: a sum of
    maxima."""
    worst = 0.0
    with torch.no_grad():
        before = outputs(model, None, forward)
        for changed in range(len(SEQUENCES)):
            moved = [
                (x - y).abs().max().item() for x, y in zip(outputs(model, changed, forward), before)
            ]
            assert moved.pop(changed) > 0.1
            worst += sum(moved)  # unlike max, a sum does not lose a nan
    return worst


ATTENTIONS = ["varlen", "sdpa", "eager", "flex_attention", "flash_attention_2"]
# flex_attention has no backward on CPU
WITH_BACKWARD = [x for x in ATTENTIONS if x != "flex_attention" or torch.cuda.is_available()]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sequence_does_not_move_its_neighbours(folders, attention):
    """Guards attention across the boundaries in a packed row, forward: not even a rounding error
    may come through."""
    cases = exact.ARCHITECTURES
    if attention == "flex_attention":  # compiles long
        cases = cases[:1]
    for case in cases:
        for training in (True, False):
            assert leak(load(folders / case, attention, training)) == 0.0, (case, training)


def keep_inputs(model) -> list:
    """Will have the embedded tokens of every forward, that keep their gradients."""
    inputs = []

    def keep(module, args, out):
        out.retain_grad()
        inputs.append(out)

    model.get_input_embeddings().register_forward_hook(keep)
    return inputs


@pytest.mark.parametrize("attention", WITH_BACKWARD)
def test_no_gradient_comes_from_a_neighbour(folders, attention):
    """Guards attention across the boundaries in a packed row, backward: a loss on one sequence has
    a gradient of exactly 0 at the inputs of all others, and gives the same gradients of the weights
    whatever the others are."""
    for case in exact.ARCHITECTURES:
        model = load(folders / case, attention)
        inputs = keep_inputs(model)
        for own in range(len(SEQUENCES)):
            gradients = []
            for changed in [None, *(b for b in range(len(SEQUENCES)) if b != own)]:
                outputs(model, changed)[own].sum().backward()
                parts = inputs.pop().grad[0].split([n - 1 for n in SEQUENCES])
                felt = [x.abs().max().item() for x in parts]
                assert felt.pop(own) > 1e-3 and set(felt) == {0.0}, case
                gradients.append([p.grad.clone() for p in model.parameters()])
                model.zero_grad()
            for others in gradients[1:]:
                assert all(torch.equal(x, y) for x, y in zip(others, gradients[0])), case


@pytest.mark.parametrize("fault", ["attention_mask", "use_cache"])
@pytest.mark.parametrize("attention, leaks", [("sdpa", True), ("eager", True), ("varlen", False)])
def test_the_known_leak_is_noticed(folders, attention, leaks, fault):
    """Guards the two tests above: with an attention mask of ones, or with the cache that is
    transformers' default, its own attentions let packed sequences see each other. Ours knows no
    masks."""
    model = load(folders / "qwen2-tied-policy", attention)
    options = {
        "attention_mask": torch.ones(1, sum(SEQUENCES) - len(SEQUENCES), dtype=torch.long),
        "use_cache": False,
    }

    def forward(model, p):
        where = {"cu_seqlens": p.cu_seqlens, "max_seqlen": p.max_seqlen, "logits_to_keep": p.keep}
        model.lm_head.targets, model.lm_head.temperature = p.targets, 0.7
        wrong = options if fault == "attention_mask" else {}
        out = model(input_ids=p.ids, position_ids=p.position_ids, **where, **wrong)
        return out.logits[0].unbind(-1)

    assert leak(model, forward) > 0.1 if leaks else leak(model, forward) == 0.0
