"""PasticheLoadMini: schema and outputs."""
import torch

from pastiche.nodes.mini import LoadMini


def test_schema():
    schema = LoadMini.GET_SCHEMA()
    assert schema.node_id == "PasticheLoadMini"
    assert [(i.id, i.default) for i in schema.inputs] == [("kind", "photo"), ("architecture", "unet")]
    assert schema.inputs[1].options == ["unet", "transformer"]
    assert [o.io_type for o in schema.outputs] == ["MODEL", "VAE", "CONDITIONING"]
    assert all(part.tooltip for part in [*schema.inputs, *schema.outputs])


def test_help_page_exists(repository):
    assert (repository / "js" / "docs" / "PasticheLoadMini.md").is_file()


def test_outputs_work_together():
    model, vae, conditioning = LoadMini.execute("painting").args
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(image)
    assert latent.shape[1] == model.model.latent_format.latent_channels
    assert conditioning[0][0].shape[-1] == model.model.model_config.unet_config["context_dim"]


def test_architecture_is_handed_to_the_loader(monkeypatch):
    asked = {}

    def load(**options):
        asked.update(options)
        return "model", "vae", {"drawing": "conditioning"}

    monkeypatch.setattr("pastiche.nodes.mini.load_mini", load)
    assert LoadMini.execute("drawing", "transformer").args == ("model", "vae", "conditioning")
    assert asked == {"architecture": "transformer"}
    LoadMini.execute("drawing")  # a workflow saved before the input existed
    assert asked == {"architecture": "unet"}
