"""torch's weights_only reader, independent of what other packs have allowed it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


@contextlib.contextmanager
def only_these(records: Sequence[tuple[type, str]] = ()) -> Iterator[None]:
    """While inside, torch's allow-list holds these (class, name in files) and nothing of ComfyUI's or other packs'.

    Afterwards it is as it was.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(list(records))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
