"""A pretended accelerator: a module is run on a device "gpu" whose tensors lie in main memory and mix with no others.

    python tests/pretended_gpu.py sora_llm.train configs/llama7b.yaml …

Without a GPU nothing else shows that a tensor was left on the wrong device.  Operations on this device's tensors are
computed by the CPU's kernels; one that is given tensors of both devices fails as on a GPU, and so does a collective
of CPU tensors, as under nccl.  What it does not have: a GPU's kernels, streams, memory and generators, the branches for
a device of type "cuda", and DeepSpeed.

The backend is torch's own for devices written in Python; the tensors are wrappers, as torch's FakeTensor is.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
TAKE_INDICES = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Of a GPU's tensor, also indices on the CPU."""
BELOW_PYTHON = ("empty.memory_format", "empty_strided", "copy_", "_to_copy")
"""What torch's C++ calls for this device where it has switched the wrappers off."""
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "gather")
COUNTED = "operations on the pretended GPU"


class Backend:
    """torch.gpu, as far as torch and accelerate ask."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are the CPU's, which is seeded too."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
GPU = torch.device("gpu", 0)
operations = 0


class OnGpu(torch.Tensor):
    """A tensor of the device; `held` is its memory: a CPU tensor of the same shape and strides."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: OnGpu) -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.held = new.held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func` in main memory, if its tensors may be combined."""
    global operations
    operations += 1
    has_indices = func in TAKE_INDICES and isinstance(args[0], OnGpu)
    together = (args[0], *args[2:]) if has_indices else args
    tensors = [leaf for leaf in tree_leaves((together, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    if here and elsewhere and func not in COPIES:
        given = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {given}")
    if func is aten.is_pinned.default:
        return False
    target = kwargs.get("device")
    if func is aten.copy_.default:
        stays = isinstance(args[0], OnGpu)
    else:
        stays = bool(here) if target is None else torch.device(target).type == GPU.type
    held_args, held_kwargs = tree_map_only(OnGpu, lambda tensor: tensor.held, (list(args), dict(kwargs)))
    if target is not None and stays:
        held_kwargs.update(device=torch.device("cpu"), pin_memory=False)
    found = func(*held_args, **held_kwargs)
    if not stays:
        return found
    found = tree_map_only(torch.Tensor, lambda tensor: tensor if isinstance(tensor, OnGpu) else OnGpu(tensor), found)
    return return_and_correct_aliasing(func, args, kwargs, found) if here else found


def _kernel(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(aten, packet), overload or "default")
    return lambda *args, **kwargs: compute(func, args, kwargs)


LIBRARY = torch.library.Library("aten", "IMPL")
for name in BELOW_PYTHON:
    LIBRARY.impl(name, _kernel(name), "PrivateUse1")


# ----- what knows a fixed list of devices -----------------------------------------------------------------------------


class AnyGenerator(torch.Generator):
    """Generators of the device are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> AnyGenerator:
        return super().__new__(cls, "cpu" if torch.device(device).type == GPU.type else device)


class Weight4bit(OnGpu):
    """A 4-bit weight of the device (bitsandbytes' own class cannot become a wrapper)."""

    _is_param = True

    @staticmethod
    def __new__(cls, weight: Any) -> Weight4bit:
        found = OnGpu.__new__(cls, weight.data)
        found.__dict__.update(vars(weight))
        found.quant_state.to(GPU)
        return found


def let_bitsandbytes_use_it() -> None:
    from bitsandbytes.nn.modules import Params4bit

    make = Params4bit.__new__

    def new(cls: type, data: torch.Tensor | None = None, *args: Any, **options: Any) -> Any:
        if isinstance(data, OnGpu):
            return Weight4bit(make(cls, data.held, *args, **options).to("cpu"))
        return make(cls, data, *args, **options)

    Params4bit.__new__ = new


def let_safetensors_use_it() -> None:
    import peft.utils.save_and_load
    from safetensors.torch import load_file

    def load(filename: Path, device: Any = "cpu") -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in load_file(filename).items()}

    peft.utils.save_and_load.safe_load_file = load


def refuse_other_tensors(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        for leaf in tree_leaves((args, options)):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnGpu):
                raise RuntimeError(f"No backend type associated with device type cpu ({collective.__name__})")
        return collective(*args, **options)

    return call


def prepare() -> None:
    """Let libraries take the device for one that they know."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(GPU)
    torch.Generator = AnyGenerator
    for name in COLLECTIVES:
        setattr(dist, name, refuse_other_tensors(getattr(dist, name)))
    let_bitsandbytes_use_it()
    let_safetensors_use_it()


def main(module: str, *arguments: str) -> None:
    prepare()
    atexit.register(lambda: print(f"{operations} {COUNTED}", file=sys.stderr, flush=True))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
