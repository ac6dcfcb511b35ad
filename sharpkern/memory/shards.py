"""Models under FSDP2 on ranks that are not there: torch's own sharding, and collectives that do nothing."""

from types import TracebackType

from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class Shards:
    """A context with as many ranks as there are GPUs, this being the first; of one GPU nothing is sharded.

    Args:
        num_gpus: how many.
        mode: of the models' fake tensors.

    Raises:
        ValueError: there are ranks already, when it is entered.
    """

    def __init__(self, num_gpus: int, mode: FakeTensorMode) -> None:
        self._num_gpus, self._mode = num_gpus, mode

    def __enter__(self) -> "Shards":
        if self._num_gpus > 1:
            if not distributed.is_available() or distributed.is_initialized():
                raise ValueError(
                    f"num_gpus must be 1 where torch.distributed is in use or not there, got {self._num_gpus}; plan in "
                    "a process of its own"
                )
            from torch.testing._internal.distributed.fake_pg import FakeStore

            distributed.init_process_group("fake", rank=0, world_size=self._num_gpus, store=FakeStore())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._num_gpus > 1:
            distributed.destroy_process_group()

    def of(self, model: nn.Module) -> nn.Module:
        """Return a model that is sharded layer by layer: every member of a module list, and what is left.

        Args:
            model: on fake tensors; changed.
        """
        if self._num_gpus == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self._num_gpus,))
        with self._mode:
            for module in list(model.modules()):
                if isinstance(module, nn.ModuleList):
                    for layer in module:
                        fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model
