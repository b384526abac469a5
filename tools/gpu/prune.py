"""Makes vLLM's wheel small enough to be carried to one Hopper card: prune.py UNPACKED_WHEEL OUT

Keeps Python, and of the compiled libraries those that a dense bf16 model on compute capability 9.0
loads. In these it takes out the GPU programs that such a run never asks for. No offset outside of
them changes, and the zeros that are left compress to nothing.

A fat binary (one for each source file) is a list of images: PTX (kind 1) or machine code (kind 2) for
an architecture. The images that stay move to the front of their list, the list's header gets the new
length, and what is behind becomes zeros. A list with nothing left gets a small valid image for another
architecture, as in any library without code for the card: CUDA then says "no kernel image is
available" when, and only when, one of its kernels is started.
"""

import re
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCH = 90
# path below vllm/ -> which images stay: "arch", those for the card; "fa3", of these bf16 with heads of
# 64 and 128 (smaller heads are padded to 64) and everything that is no attention kernel; None: all
LIBRARIES = {
    "_C_stable_libtorch.abi3.so": "arch",  # norms, activations, rotary, cache, sampling
    "vllm_flash_attn/_vllm_fa3_C.abi3.so": "fa3",  # FlashAttention 3
    "cumem_allocator.abi3.so": None,  # sleep mode
    "spinloop.abi3.so": None,
    "fs_io_C.abi3.so": None,
}
DROP = (  # folders and files that a dense bf16 model never opens
    "vllm-rs",
    "third_party/fmha_sm100",
    "third_party/deep_gemm",
    "third_party/tml_fa4",
    "third_party/triton_kernels",
    "entrypoints/serve/instrumentator/static",
    "kernels/helion/configs",
    "model_executor/layers/fused_moe/configs",
    "model_executor/layers/quantization/utils/configs",
    "model_executor/layers/mamba/configs",
)
SHAPES = {(64, 64), (128, 128)}  # (head size of q and k, of v)
# CollectiveMainloopFwdSm90<stages, cluster, (M, N, K), size of v, type, float, Sm90, flags ...>
KERNEL = re.compile(
    rb"CollectiveMainloopFwdSm90ILi\d+EN4cute5tupleIJ.{0,40}?EEENS\w_IJ(.{0,60}?)EEELi(\d+)E"
    rb"(.{0,24}?)fNS_4arch4Sm90E"
)
MACHINE_CODE = 2


@dataclass(frozen=True)
class Image:
    """A GPU program in a fat binary, with its own header."""

    kind: int
    arch: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class FatBinary:
    start: int
    first: int  # where its images begin, behind the header
    images: list[Image]


def fat_sections(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset, size) of the sections of an ELF file that hold fat binaries."""
    assert data[:5] == b"\x7fELF\x02", "no 64-bit ELF file"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", data, table + i * entry) for i in range(count)]
    for name, _, _, _, offset, size in heads:
        start = heads[names][4] + name
        if data[start : data.index(b"\0", start)] == b".nv_fatbin":
            yield offset, size


def fat_binaries(data: bytes) -> Iterator[FatBinary]:
    for at, size in fat_sections(data):
        end = at + size
        while at + 16 <= end:
            magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
            if magic != 0xBA55ED50:  # padding
                at += 8
                continue
            stop = at + header + length
            yield FatBinary(at, at + header, list(images(data, at + header, stop)))
            at = stop


def images(data: bytes, at: int, stop: int) -> Iterator[Image]:
    while at < stop:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        end = at + header + payload
        ok = kind in (1, MACHINE_CODE) and 30 < arch < 200 and end <= stop
        assert ok, f"odd image at {at}: {kind} {arch}"
        yield Image(kind, arch, at, end)
        at = end


def is_wanted(program: bytes) -> bool:
    """No attention kernel, or one of the wanted shapes in bf16."""
    kernels = list(KERNEL.finditer(program))
    for kernel in kernels:
        heads = int(re.findall(rb"Li(\d+)E", kernel[1])[-1])
        if b"bfloat16" in kernel[3] and (heads, int(kernel[2])) in SHAPES:
            return True
    return not kernels


def prune_library(path: Path, how: str | None, filler: bytes) -> str:
    """In place; says what stayed. `filler`: an image for another architecture."""
    data = path.read_bytes()
    if how is None:
        return f"{len(data) / 1e6:.1f} MB, as it is"
    new = bytearray(data)
    kept, lost = [], []  # sizes
    for binary in fat_binaries(data):
        stay = b""
        for image in binary.images:
            program = data[image.start : image.end]
            ours = image.kind == MACHINE_CODE and image.arch == ARCH
            if ours and (how == "arch" or is_wanted(program)):
                stay += program
                kept.append(image.size)
            else:
                lost.append(image.size)
        stay = stay or filler
        room = binary.images[-1].end - binary.first
        assert len(stay) <= room, f"{path}: a list at {binary.start} is too short for the filler"
        new[binary.first : binary.first + room] = stay + bytes(room - len(stay))
        struct.pack_into("<Q", new, binary.start + 8, len(stay))
    assert kept and len(new) == len(data), f"{path}: no image for {ARCH} is left"
    path.write_bytes(new)
    return (
        f"{len(data) / 1e6:.1f} MB: {len(kept)} images stay ({sum(kept) / 1e6:.1f} MB), "
        f"{len(lost)} go ({sum(lost) / 1e6:.1f})"
    )


def small_image(path: Path) -> bytes:
    """The smallest image of machine code for an architecture below the card's."""
    data = path.read_bytes()
    found = []
    for binary in fat_binaries(data):
        for image in binary.images:
            if image.kind == MACHINE_CODE and image.arch < 80:
                found.append(image)
    smallest = min(found, key=lambda image: image.size)
    return data[smallest.start : smallest.end]


def copy_tree(wheel: Path, out: Path) -> None:
    """What a dense bf16 model opens."""
    source = wheel / "vllm"

    def ignored(folder: str, names: list[str]) -> list[str]:
        at = Path(folder).relative_to(source)
        found = []
        for name in names:
            place = str(at / name)
            library = name.endswith(".so") and place not in LIBRARIES
            if library or place in DROP or name == "__pycache__":
                found.append(name)
        return found

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out / "vllm", ignore=ignored)
    for info in wheel.glob("vllm-*.dist-info"):
        (out / info.name).mkdir()
        for name in ("METADATA", "entry_points.txt"):  # vLLM looks for plug-ins among entry points
            if (info / name).exists():
                shutil.copy(info / name, out / info.name)


def tree_size(folder: Path, without: str = "") -> float:
    """MB."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.suffix != without) / 1e6


def main(wheel: Path, out: Path) -> None:
    copy_tree(wheel, out)
    filler = small_image(wheel / "vllm/_C_stable_libtorch.abi3.so")
    for name, how in LIBRARIES.items():
        path = out / "vllm" / name
        said = "this release has none"
        if path.exists():
            said = prune_library(path, how, filler)
        print(f"{name}: {said}")
    python = tree_size(out, without=".so")
    print(f"{tree_size(wheel):.0f} MB unpacked before; now {python:.1f} MB besides the libraries")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
