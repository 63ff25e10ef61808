"""What every training of an embedded network has to hold."""

import torch


def check_resumption(make_trainer, size, rate):
    """A trainer that is saved after two steps and resumed goes on with the same losses to the same weights."""
    straight = make_trainer()
    for _ in range(2):
        straight.train_step(size, 4, rate)
    straight.save()
    other = make_trainer()
    other.resume()
    assert (other.step, other.images) == (2, 8)
    resumed = [float(other.train_step(size, 4, rate)) for _ in range(2)]
    straight.seed_samplers(2)  # a resumed run draws anew from its step
    assert [float(straight.train_step(size, 4, rate)) for _ in range(2)] == resumed
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
        assert torch.equal(straight.average[name], other.average[name]), name
