"""``python -m halo_tensor bench``: compare bf16 with the recipe that suits this GPU, as a table to paste into an issue.

It runs linear layers and a Llama-like block forward and backward, eagerly and compiled, with random weights and data. Weights
are quantised again in every step, as they are after an optimiser's write.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.analysis import gpus
from halo_tensor.calibration.candidates import fastest_first
from halo_tensor.config import HaloConfig, halo_config
from halo_tensor.convert import quantize_
from halo_tensor.diagnostics.machine import environment, source_commit
from halo_tensor.kernels.device import check_device, check_scales
from halo_tensor.weight.tensor import HaloWeight

LINEARS = ((4096, 14336), (14336, 4096), (4096, 4096))  # in×out of Llama-3-8B
#: A larger relative error is a wrong result. The gradients of a block differ by 4 % in int8, 7 % in fp8 and 10 % in fp6.
LARGEST_ERROR = 0.2
NO_GPU = (
    "Speed is not measured on a CPU: `python -m halo_tensor bench` needs an NVIDIA GPU (report() measures accuracy anywhere)."
)
NOTES = (
    "ms: medians, forward and backward. Error: relative, the largest of the result's and of all gradients', against bf16's on "
    "the same random weights and data."
)


class Block(nn.Module):
    """A Llama block without rotary embeddings: attention with grouped heads of 128, then SwiGLU.

    Args:
        width: features of the input and the output.
        hidden: features of the MLP.
        heads: of queries.
        kv_heads: of keys and values.
    """

    def __init__(self, width: int = 4096, hidden: int = 14336, heads: int = 32, kv_heads: int = 8):
        super().__init__()
        self.head = width // heads
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv_heads * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to x [batch, length, width]."""
        h = self.norm(x)
        q, k, v = (linear(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is measured.
        make: makes the module.
        width: features of its input.
        out: features of its output.
        compiled: whether ``torch.compile`` is used.
    """

    name: str
    make: Callable[[], nn.Module]
    width: int
    out: int
    compiled: bool


def cases() -> Iterator[Case]:
    """Yield all cases. Compiled ones take longest and come last."""
    for compiled in (False, True):
        yield Case("Llama-like block", Block, 4096, 4096, compiled)
        for n_in, n_out in LINEARS[:1] if compiled else LINEARS:
            yield Case(f"linear {n_in}→{n_out}", partial(nn.Linear, n_in, n_out, bias=False), n_in, n_out, compiled)


def measure(case: Case, config: HaloConfig, batch: int, length: int, device: torch.device) -> tuple[float, float, float]:
    """Return the ms of a step in bf16, the ms under the config, and the largest relative error of its results."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device(device):
        x = torch.randn(batch, length, case.width, dtype=torch.bfloat16, requires_grad=True)
        e = torch.randn(batch, length, case.out, dtype=torch.bfloat16)
        exact, quantized = (case.make().to(torch.bfloat16) for _ in range(2))
    quantized.load_state_dict(exact.state_dict())
    quantize_(quantized, config)
    times, found = [], []
    for module in (exact, quantized):
        f = torch.compile(module, dynamic=False) if case.compiled else module
        weights = [p for p in module.parameters() if isinstance(p, HaloWeight)]

        def step(
            f: Callable = f, module: nn.Module = module, weights: Sequence[HaloWeight] = weights
        ) -> tuple[torch.Tensor, ...]:
            for weight in weights:
                weight.requantize()
            y = f(x)
            return y, *torch.autograd.grad(y, [x, *module.parameters()], e)

        found.append([t.detach() for t in step()])
        times.append(milliseconds(step))
    return times[0], times[1], max(map(_relative_error, found[1], found[0]))


def milliseconds(step: Callable) -> float:
    """Return the median time of a step, over half a second of steps."""
    from triton.testing import do_bench

    return do_bench(step, warmup=100, rep=500, return_mode="median")


def _relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.float()
    error = ((actual.float() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")


def header(device: torch.device, tokens: str) -> str:
    """Return a line with the machine, the versions and the size of the data, and a line with the fast paths that are off."""
    found = environment()
    gpu = f"{torch.cuda.get_device_name(device)} (compute capability {_capability(device)}), driver {driver()}"
    commit = source_commit()
    versions = [f"torch {found['torch']}", f"Triton {found['triton']}", f"halo_tensor {found['halo_tensor']}"]
    lines = [f"{', '.join([gpu, *versions])} (commit {commit or 'unknown'}); {tokens} tokens"]
    off = [f"{name}, {state}" for name, state in found["fast paths"].items() if state != "on"]
    return "\n\n".join([*lines, f"Fast paths: {'; '.join(off)}"] if off else lines)


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def driver() -> str:
    """Return the version of the GPU's driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def recommended(device: torch.device) -> HaloConfig:
    """Return the default candidate with the shortest predicted time, or int8 HALO-1 if none is faster than bf16."""
    return (*fastest_first(device, gpus.modelled(None, device)), halo_config(1, "int8"))[0]


def table(name: str, rows: list[tuple[Case, float, float, float]]) -> str:
    """Return a Markdown table. ``rows`` holds a case, the ms in bf16, the ms under the config ``name``, and the error."""
    lines = [f"| forward + backward | | bf16 ms | {name} ms | × bf16 | error |", "|---|---|---|---|---|---|"]
    for case, bf16, ours, error in rows:
        how = "compiled" if case.compiled else "eager"
        wrong = "" if error < LARGEST_ERROR else " **wrong**"
        lines.append(f"| {case.name} | {how} | {bf16:.3f} | {ours:.3f} | {bf16 / ours:.2f} | {100 * error:.2g} %{wrong} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--level", type=int, choices=(0, 1, 2), help="HALO level, instead of the recommended recipe")
    parser.add_argument("--dtype", choices=("int8", "fp8", "fp6"), help="number format, instead of the recommended recipe")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=80, help="time after which no further measurement begins")


def run(args: argparse.Namespace) -> int:
    """Run the command. Return its exit code: that of :func:`bench`, or 2 if no GPU can multiply the formats."""
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    config = recommended(device)
    if args.level is not None or args.dtype is not None:
        config = halo_config(1 if args.level is None else args.level, args.dtype or "int8")
    try:
        check_scales(config.recipe.granularities, device)
        check_device(config.recipe.formats, device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return bench(config, device, args, cases())


def bench(config: HaloConfig, device: torch.device, args: argparse.Namespace, todo: Iterable[Case]) -> int:
    """Measure the cases ``todo`` and print the table. Return 0, or 1 if a result is wrong or nothing ran."""
    name, start = f"{config.dtype} HALO-{config.level}", time.monotonic()
    rows, left_out = [], []
    for case in todo:
        label = f"{case.name}, {'compiled' if case.compiled else 'eager'}"
        if time.monotonic() - start > args.seconds:
            left_out.append(f"{label}: {args.seconds:g} s were over")
            continue
        print(f"{label} ...", file=sys.stderr, flush=True)
        try:
            rows.append((case, *measure(case, config, args.batch, args.length, device)))
        except Exception as error:
            left_out.append(f"{label}: {type(error).__name__}: {error}".splitlines()[0][:300])
    print(f"{header(device, f'{args.batch}×{args.length}')}\n\n{table(name, rows)}\n\n{NOTES}")
    if left_out:
        print("\nWithout a row:\n" + "\n".join(f"- {line}" for line in left_out))
    return 0 if rows and all(error < LARGEST_ERROR for *_, error in rows) else 1
