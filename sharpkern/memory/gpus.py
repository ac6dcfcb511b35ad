"""Models under FSDP2 on ranks that are not there: torch's own sharding, and collectives that do nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def ranks(num_gpus: int) -> Iterator[None]:
    """Have as many ranks as there are GPUs, this being the first; one GPU needs none."""
    if num_gpus == 1:
        yield
        return
    if not distributed.is_available() or distributed.is_initialized():
        raise ValueError(
            f"num_gpus must be 1 where torch.distributed is in use or not there, got {num_gpus}; plan in a process of "
            "its own"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=num_gpus, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def shard(model: nn.Module, num_gpus: int, mode: FakeTensorMode) -> None:
    """Shard a model layer by layer: every member of a module list, and what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (num_gpus,))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    with mode:
        for layer in (layer for layers in lists for layer in layers):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
