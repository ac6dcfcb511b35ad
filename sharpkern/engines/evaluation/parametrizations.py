"""What `torch.nn.utils.parametrize.cached` keeps: weights made of θ, which no evaluation elsewhere may read."""

from collections.abc import Callable

from torch.nn.utils import parametrize


def note_cache() -> Callable[[], None]:
    """Return what puts the cache back, with the very tensors that are in it now."""
    enabled, kept = parametrize._cache_enabled, parametrize._cache

    def put_back() -> None:
        parametrize._cache_enabled, parametrize._cache = enabled, kept

    return put_back


def empty_cache() -> None:
    """Have every weight made anew, once where a run has the cache on; what was kept is left to whoever noted it."""
    parametrize._cache = {}
