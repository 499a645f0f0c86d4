"""Networks over several processes: whole in each (DDP), or cut into as many parts as there are processes (FSDP2).

accelerate's launcher says which (``ACCELERATE_USE_FSDP``). The cutting itself is done here, by torch's ``fully_shard``,
because accelerate's own covers GPUs only: what the tests run with gloo is what a GPU runs. Parameters become
``DTensor``; what is made of them afterwards (moments, averages) is cut in the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import RunConfig

if TYPE_CHECKING:
    from .protocols import Trainable


def shards() -> bool:
    """Whether this process was launched to hold a part of the network only."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and torch.distributed.is_initialized()


def check_launch(config: RunConfig) -> None:
    """Whether a run can be done as its launcher asks.

    Raises:
        ValueError: DeepSpeed, or an FSDP that is not supported; or settings that FSDP does not take. The message says
            what to write instead.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "launched with DeepSpeed, which keeps weights, optimiser and steps to itself: this loop cannot skip its "
            "steps or write its checkpoints. launch/zero2.yaml cuts the same things (gradients and optimiser) by FSDP2"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    plugin, policy = FullyShardedDataParallelPlugin(), os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    wrong = {
        f"fsdp_version: {plugin.fsdp_version} (set it to 2)": plugin.fsdp_version != 2,
        "fsdp_offload_params: true (set it to false)": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_cpu_ram_efficient_loading: true (set it to false)": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing: true (set the run's gradient_checkpointing)": plugin.activation_checkpointing,
        f"fsdp_auto_wrap_policy: {policy} (set it to TRANSFORMER_BASED_WRAP)": policy.upper() == "SIZE_BASED_WRAP",
        f"optim: {config.optim}, whose statistics span whole matrices (set it to adamw)": config.optim != "adamw",
        "mixed_precision: fp16 (set it to bf16 or no)": config.mixed_precision == "fp16",
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"FSDP cannot be used with {'; '.join(found)}")


def distribute(trained: Trainable, accelerator: Accelerator) -> nn.Module:
    """Make what is trained ready for all processes of the run; returns the module whose gradients are shared.

    Optimisers and averages are to be built from ``trained``'s parameters after this call.

    Raises:
        ValueError: networks are to be cut, but what is trained can only be held whole.
    """
    if not shards():
        prepared: nn.Module = trained.wrap(accelerator.prepare)
        return prepared
    if not trained.shardable:
        raise ValueError(
            "FSDP cuts networks whose weights are all trained (full_finetuning: true). A LoRA, a scorer or an "
            "evaluator is small and trains faster whole in each process: launch it with launch/ddp.yaml"
        )
    network = trained.wrap(lambda module: accelerator.prepare_model(module, evaluation_mode=True))
    for part in trained.shardable:
        shard(part, accelerator)
    here, whole = held(trained.shardable)
    accelerator.print(
        f"FSDP2: the first of {accelerator.num_processes} processes holds {here:,} of {whole:,} weights, reference too",
        file=sys.stderr,
    )
    return network


def held(networks: Sequence[nn.Module]) -> tuple[int, int]:
    """How many weights of ``networks`` this process holds, and how many there are."""
    weights = [weight for network in networks for weight in network.parameters()]
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return sum(part.numel() for part in parts), sum(weight.numel() for weight in weights)


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Cut ``network`` in place. Its blocks are gathered one after the other when it runs.

    Blocks are those that the launcher's ``fsdp_transformer_layer_cls_to_wrap`` names, or the network's own
    ``_no_split_modules``.
    """
    plugin = FullyShardedDataParallelPlugin()
    blocks = plugin.transformer_cls_names_to_wrap or getattr(network, "_no_split_modules", None) or ()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    network.to(memory_format=torch.contiguous_format)  # parts of channels_last weights are not supported
    inner_first = [module for module in network.modules() if type(module).__name__ in blocks][::-1]
    for module in inner_first:
        fully_shard(module, **options)
    fully_shard(network, **options)


def is_cut(network: nn.Module) -> bool:
    """Whether this process holds a part of ``network`` only."""
    return isinstance(network, FSDPModule)


def forget_gathered(network: nn.Module) -> None:
    """Free what ``network`` gathered to run: after its weights were replaced, it is out of date."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def uncut(tensor: Tensor) -> Tensor:
    """The whole of a tensor; called by all processes together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def uncut_by_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, on the host of the first process; called by all processes together.

    They are gathered a few at a time, so that no device ever holds many of them. Other processes get only those that
    are not cut, which are as they were in every process.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    cut = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    for names in packs(cut):
        parts = [equal_part(cut[name]) for name in names]
        together = gathered_by_first(torch.cat(parts))
        if together is None:
            continue
        for name, columns in zip(names, together.split([len(part) for part in parts], dim=1), strict=True):
            shape = cut[name].shape
            whole[name] = columns.reshape(-1, *shape[1:])[: shape[0]].cpu()
    return whole


def packs(tensors: Mapping[str, Tensor], most: int = 2**26) -> Iterator[list[str]]:
    """Names of tensors of one dtype that have at most ``most`` numbers together, or of a single larger one."""
    names: list[str] = []
    for name, tensor in tensors.items():
        alike = not names or tensors[names[0]].dtype == tensor.dtype
        if names and not (alike and sum(tensors[n].numel() for n in names) + tensor.numel() <= most):
            yield names
            names = []
        names.append(name)
    if names:
        yield names


def equal_part(tensor: DTensor) -> Tensor:
    """This process's rows of a tensor, one after the other, with zeros where other processes have one row more.

    ``fully_shard`` gives each of n processes ceil(rows / n) rows, and what is left, perhaps none, to the last ones.
    """
    rows, local = -(-tensor.shape[0] // tensor.device_mesh.size()), tensor.to_local()
    part = local.new_zeros(rows, *tensor.shape[1:])
    part[: len(local)] = local
    return part.flatten()


def gathered_by_first(part: Tensor) -> Tensor | None:
    """The parts (n,) of all P processes as (P, n), in the first one; None in the others."""
    state = PartialState()
    parts = [torch.empty_like(part) for _ in range(state.num_processes)] if state.is_main_process else None
    torch.distributed.gather(part, parts, dst=0)
    return None if parts is None else torch.stack(parts)


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """This process's part of ``tensor``, the same in all processes, cut as ``example``; whole if that is, or if it has
    another shape (a count of steps)."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    placed = tensor.to(example.device)
    return distribute_tensor(placed, example.device_mesh, example.placements, src_data_rank=None)


@contextmanager
def saved_whole(network: nn.Module) -> Iterator[None]:
    """Inside, ``network.state_dict()`` in the first process is that of the whole network; entered by all together."""
    if not is_cut(network):
        yield
        return
    whole = uncut_by_first(network.state_dict())

    def replace(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        state.update(whole)

    handle = network.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()
