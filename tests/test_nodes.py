"""Two nodes against one plain process: of one process each; and of two, everything switched on."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import launch
import pytest
import toy

ROOT = Path(__file__).resolve().parent.parent
KEYS = """policy/loss policy/grad_norm policy/ref_kl policy/entropy critic/loss critic/grad_norm
    rollout/length_mean""".split()
COUNTDOWN = """ppo.py --task countdown3 --max_prompt_tokens 64 --max_new_tokens 24
    --prompts_per_step 8 --samples_per_prompt 2 --minibatch_size 8 --max_tokens_per_microbatch 400
    --lr 1e-3 --kl_coef 0.1 --entropy_coef 0.1 --steps 2""".split()
ALL_AT_ONCE = """--tp 2 --sp 2 --replicas 2 --offload policy critic reference
    --gradient_checkpointing --save_every 1 --profile 2""".split()


def check_same(expected: list[dict], rows: list[dict]) -> None:
    for one, nodes in zip(expected, rows, strict=True):
        assert {key: nodes[key] for key in KEYS} == pytest.approx(
            {key: one[key] for key in KEYS}, rel=1e-4, abs=1e-6
        )
        assert nodes["mismatch/canary"] < 1e-4


def test_two_nodes_of_a_process_each_are_one_process(tmp_path):
    """Guards a main rank on every node, in what a run says and writes. The variables are torchrun's."""
    model = str(tmp_path / "model")
    toy.make_model(model)
    flags = "--steps 2 --prompts_per_step 16 --minibatch_size 8 --kl_coef 0.1 --model".split()
    flags.append(model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    nodes = [
        launch.start("tests/toy.py", tmp_path / "nodes", *flags, env=world | own | {"RANK": rank})
        for rank in ("0", "1")
    ]
    first, second = (ended.good().said for ended in launch.at_once(*nodes))
    assert "FSDP2 over 2 ranks" in first and "step    2/2" in first
    assert "step " not in second
    check_same(toy.run(str(tmp_path / "one"), *flags), launch.metrics(tmp_path / "nodes"))


# ----------------------------------------------------------------- two hosts, as far as sockets know


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextmanager
def two_hosts():
    """[(what to put before a command, its address)]: two network namespaces with a cable between
    them, hosts as far as sockets can tell. Where these cannot be made: this host, twice."""
    names = [f"ppo-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    if os.geteuid() or not shutil.which("ip"):
        print("no network namespaces (they need root and iproute2): both nodes are this host")
        yield [([], "127.0.0.1")] * 2
        return
    try:
        for name in names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        one, other = names
        ip(f"-n {one} link add cable type veth peer name cable netns {other}")
        for i, name in enumerate(names):
            ip(f"-n {name} addr add 10.77.0.{i + 1}/24 dev cable")
            ip(f"-n {name} link set cable up")
        hosts = [
            (["ip", "netns", "exec", name], f"10.77.0.{i + 1}") for i, name in enumerate(names)
        ]
    except subprocess.CalledProcessError as error:
        print(f"no network namespaces ({error.stderr}): both nodes are this host")
        hosts = [([], "127.0.0.1")] * 2
    try:
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def nodes(*flags: str) -> list[str]:
    """What the nodes print of one run, started as docs/scaling.md says: by torchrun, inside network namespaces."""
    running = []
    with two_hosts() as hosts:
        head = f"{hosts[0][1]}:29477"
        for i, (inside, address) in enumerate(hosts):
            env = dict(os.environ)
            if inside:
                env |= {"GLOO_SOCKET_IFNAME": "cable", "VLLM_HOST_IP": address}
            # is_host and local_addr: these hosts have no names. Real ones do
            launch = f"""--nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint {head}
                --rdzv_conf is_host={int(i == 0)} --local_addr {address}""".split()
            command = [*inside, sys.executable, "-m", "torch.distributed.run", *launch, *flags]
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipe))
        said = [node.communicate(timeout=400)[0] for node in running]
    assert not any(node.returncode for node in running), said[0][-3000:] + said[1][-3000:]
    return said


@pytest.mark.full
def test_two_nodes_with_everything_are_one_process(tmp_path, tiny):
    """Guards groups that do not fit together (engines over neighbours, rows over neighbours, copies
    a node, clipping and denominators over all), optimizers on the CPU, a main rank on every node,
    and names of phases in the profile."""
    flags = [*COUNTDOWN, "--model", tiny, "--out"]
    first, second = nodes(*flags, str(tmp_path / "nodes"), *ALL_AT_ONCE)
    assert "FSDP2 over 4 ranks" in first and "step    2/2" in first and "step    2/2" not in second
    launch.run(*flags, tmp_path / "one").good()
    one = launch.metrics(tmp_path / "one")
    check_same(one, launch.metrics(tmp_path / "nodes"))
    # the weights have moved, and with them the engine's
    assert one[1]["policy/ref_kl"] != 0
    traces = sorted((tmp_path / "nodes" / "profile").iterdir())
    phases = ("forward", "sync", "update")
    assert [trace.name for trace in traces] == [
        f"{phase}_rank{rank}.json.gz" for phase in phases for rank in range(4)
    ]
    names = [
        {event.get("name") for event in json.loads(gzip.open(trace).read())["traceEvents"]}
        for trace in traces
    ]
    assert all("aten::scaled_dot_product_attention" in found for found in names)
    updates = [any("AdamW" in name for name in found if name) for found in names]
    assert updates == [False] * 8 + [True] * 4
