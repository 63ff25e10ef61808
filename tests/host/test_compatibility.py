"""Substitutes for what an older ComfyUI's node interface lacks, on interfaces of that shape."""

import types

import pytest
from comfy_api.latest import io as host_io

from pastiche.nodes.host import compatibility
from pastiche.nodes.host.compatibility import CompletedIO, completed


def older(**others):
    """Before 0.11: no `advanced`, no `search_aliases`, no boxes. Its parts keep what they were made with."""

    class Schema:
        def __init__(self, node_id, inputs=()):
            self.node_id, self.inputs = node_id, inputs

    class Float:
        io_type = "FLOAT"

        class Input:
            def __init__(self, id, default=0.0, tooltip=None):
                self.id, self.default, self.tooltip = id, default, tooltip

        class Output:
            pass

    class Mask:
        io_type = "MASK"

        class Input:
            def __init__(self, id, **others):
                self.id, self.others = id, others

    def custom(io_type):
        return types.SimpleNamespace(io_type=io_type)

    return types.SimpleNamespace(Schema=Schema, Float=Float, Mask=Mask, Custom=custom, **others)


def test_a_host_that_lacks_nothing_is_left_alone():
    assert completed(host_io) is host_io or not hasattr(host_io, "BoundingBoxes")
    assert compatibility.io.Latent is host_io.Latent


def test_keywords_of_looks_are_dropped_where_unknown():
    io = completed(older())
    made = io.Schema(node_id="X", search_aliases=["y"], is_dev_only=True, inputs=[io.Float.Input("a", default=2.0, tooltip="t", advanced=True)])
    assert (made.node_id, made.inputs[0].id, made.inputs[0].default, made.inputs[0].tooltip) == ("X", "a", 2.0, "t")
    assert io.Mask.Input("m", advanced=True).others == {"advanced": True}  # it takes anything
    assert io.Float.Output and io.Float.io_type == "FLOAT"


@pytest.mark.parametrize("make", [lambda io: io.Schema(node_id="X", is_output=True), lambda io: io.Float.Input("a", minimum=0.0)])
def test_other_keywords_are_refused_as_ever(make):
    with pytest.raises(TypeError, match="unexpected keyword"):
        make(completed(older()))


def test_late_sockets_are_made_by_name():
    io = completed(older())
    assert (io.BoundingBox.io_type, io.BoundingBoxes.io_type) == ("BOUNDING_BOX", "BOUNDING_BOXES")
    assert io.ControlAfterGenerate.fixed is True
    own = older(BoundingBoxes="the host's")
    assert completed(own).BoundingBoxes == "the host's" and completed(own).Mask is own.Mask
    with pytest.raises(AttributeError, match="Nonsense"):
        io.Nonsense


def test_sockets_by_name_are_those_of_the_host_under_test():
    for name, io_type in compatibility.SOCKETS.items():
        found = getattr(host_io, name, None)
        assert found is None or found.io_type == io_type
    assert isinstance(completed(older()), CompletedIO)
