"""Runs examples/hosts/with_torchtitan.py on a CPU, which torchtitan 0.3 does not support: a script for subprocesses.

    python tests/helpers/titan_on_cpu.py FOLDER [options of torchtitan]

FOLDER has the tokenizer and the texts. What a CPU lacks is replaced: the device's name and memory, the backward of
FlexAttention, a reduction that gloo lacks, and compiled masks, which take a C++ compiler long. Prints how many products of codes
ran in int8, or how many are in compiled graphs: of linear layers, and of experts. ``--compile.backend counting`` runs graphs
eagerly. ``--module`` and ``--config`` choose another model than Llama's debug model.
"""

import os
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._utils
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
DEBUG_MODEL = ["--module", "llama3", "--config", "llama3_debugmodel"]
PATHS = ["--hf_assets_path", ".", "--dump_folder", "out"]
OF_EXPERTS = ("grouped_mm", "grouped_grad")
SMALL = ["--training.seq_len", "64", "--training.local_batch_size", "2", "--validator.freq", "100", "--debug.seed", "0"]


def pretend_cpu_is_an_accelerator() -> None:
    """Before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    about = {"get_device_name": "CPU", "get_device_properties": SimpleNamespace(total_memory=2**34, name="CPU")}
    about |= {"reset_peak_memory_stats": None, "empty_cache": None, "memory_stats": {}, "device_count": 8, "current_device": 0}
    for name, value in about.items():
        setattr(torch.cpu, name, lambda *_, value=value: value)


def replace_what_a_cpu_lacks() -> None:
    import torchtitan.distributed.compile as compiling
    import torchtitan.distributed.fsdp as fsdp
    import torchtitan.models.common.attention as attention
    from torch.distributed.fsdp import FSDPModule

    def causal(q, k, v, *, scale, enable_gqa, **_):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa), None

    attention.FlexAttention.compiled_flex_attn = staticmethod(causal)
    attention._compiled_create_block_mask = attention.create_block_mask
    compiling._maybe_regional_inductor_backend = lambda model, backend: backend  # it would refuse to decompose FlexAttention

    def divide_by_hand(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = divide_by_hand


def register_counting() -> list[str]:
    """Register the backend "counting", and return a list of the names of this library's ops in its graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found: list[str] = []

    def count(graph, inputs):
        targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        found.extend(target._opname for target in targets if target.namespace == "halo")
        return make_boxed_func(graph.forward)

    torch._dynamo.register_backend(aot_autograd(fw_compiler=count, bw_compiler=count), name="counting")
    return found


def main() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29561"}
    os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})
    sys.path.insert(0, str(ROOT))
    os.chdir(sys.argv[1])
    pretend_cpu_is_an_accelerator()
    replace_what_a_cpu_lacks()
    from tests.helpers.recording import OpLog

    model = [] if "--module" in sys.argv else DEBUG_MODEL
    sys.argv = ["with_torchtitan.py", *model, *PATHS, *SMALL, *sys.argv[2:]]
    compiled, log = register_counting(), OpLog()
    with nullcontext() if "--compile.enable" in sys.argv else log:  # torch.compile accepts no modes
        runpy.run_path(str(ROOT / "examples" / "hosts" / "with_torchtitan.py"), run_name="__main__")
    linear = compiled.count("scaled_mm") or log.products().count(torch.int8)
    names = compiled or [name for name, dtype in log.calls if dtype in (torch.int8, None)]
    print(f"int8 products: {linear}, of experts: {sum(names.count(name) for name in OF_EXPERTS)}", flush=True)


if __name__ == "__main__":
    main()
