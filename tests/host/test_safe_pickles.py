"""What other packs allow torch's reader to construct is not constructed from a model file."""

import pytest
import torch

from pastiche.nodes.host.networks.unconditional_checkpoint import read_weights
from pastiche.nodes.host.safe_pickles import only_these


class OfAnotherPack:
    made = []

    def __setstate__(self, state):
        self.made.append(state)


@pytest.fixture
def allowed():
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([OfAnotherPack])
    OfAnotherPack.made.clear()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_unconditional_files_construct_nothing_of_other_packs(allowed, tmp_path):
    thing = OfAnotherPack()
    thing.x = 1
    torch.save({"state_dict": {"a.weight": torch.zeros(2)}, "extra": thing}, tmp_path / "net.pt")
    torch.load(tmp_path / "net.pt", weights_only=True)
    assert OfAnotherPack.made  # it would be
    OfAnotherPack.made.clear()
    with pytest.raises(ValueError, match="net.pt was refused, and nothing in it was run"):
        read_weights(tmp_path / "net.pt")
    assert not OfAnotherPack.made and OfAnotherPack in torch.serialization.get_safe_globals()


def test_the_list_is_as_it_was_after_an_error(allowed):
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(KeyError), only_these([(OfAnotherPack, "a.b")]):
        raise KeyError
    assert set(torch.serialization.get_safe_globals()) == before
