"""Makes this process's torch, dynamo, inductor and Triton take the pretended card for a real one.

    device.py PRESET KNOB=VALUE ...      prints one JSON object: what was counted, and what is wrong

It needs the preloaded runtime of cuda_runtime.c, and uses private names of torch 2.13.
"""

import os

FOLDER = os.environ["PRETEND_GPU"]
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # what is counted must be compiled
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{FOLDER}/inductor"
os.environ["TRITON_CACHE_DIR"] = f"{FOLDER}/triton"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch._inductor.runtime.triton_helpers as triton_helpers  # noqa: E402
import torch._inductor.utils as inductor_utils  # noqa: E402
import torch._subclasses.fake_tensor as fake_tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver as triton_driver  # noqa: E402

CAPABILITY = torch.cuda.get_device_capability()
SHARED_MEMORY = {(9, 0): 232448, (8, 0): 166912, (8, 9): 101376, (7, 5): 65536}


class Utils:
    """Triton's access to the driver: a kernel that ptxas has accepted is loaded and forgotten."""

    def __init__(self):
        self.kernels = []  # names of the kernels that were built

    def load_binary(self, name, binary, shared, device):
        self.kernels.append(name)
        module, function, registers, spills, threads = 0, 0, 32, 0, 1024
        return module, function, registers, spills, threads

    def get_device_properties(self, device):
        return dict(
            max_shared_mem=SHARED_MEMORY[CAPABILITY],
            multiprocessor_count=132,
            max_num_regs=65536,
            warpSize=32,
            sm_clock_rate=1_980_000,
            mem_clock_rate=2_619_000,
            mem_bus_width=5120,
        )

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return do_nothing


def do_nothing(*inputs, **settings):
    """A call of CUDA's that needs no answer."""


class Driver:
    """Triton's driver for the pretended card."""

    utils = Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return CAPABILITY

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_benchmarker(self):
        return lambda *inputs, **settings: [1.0, 1.0, 1.0]

    def map_python_to_cpp_type(self, name):
        return name

    def launcher_cls(self, *inputs, **settings):
        return do_nothing

    def is_active(self):
        return True


def use_driver() -> None:
    triton_driver.set_active(Driver())


use_driver()
triton_helpers.set_driver_to_gpu = use_driver
fake_tensor.init_gpu_context = do_nothing
inductor_utils.get_gpu_dram_gbps = lambda *device: 3350
inductor_utils.get_device_tflops = lambda dtype=None: 67 if dtype == torch.float32 else 989
torch._inductor.config.compile_threads = 1
# Whether a product is given padded operands is timed on the card, and here nothing takes time: it is not.
torch._inductor.config.shape_padding = False
torch._inductor.config.fx_graph_cache = False
torch._inductor.config.use_static_triton_launcher = False
torch._functorch.config.force_non_lazy_backward_lowering = True

if __name__ == "__main__":
    import checks

    checks.main()
