"""A style library of a test's own."""

import folder_paths
from pastiche.nodes.host.features.library import register_folder


def own_library(folder, monkeypatch):
    """ComfyUI's output folder, and nothing in the two folders of styles but what is put there."""
    nothing = {name: ([], {".safetensors"}) for name in ("loras", "pastiche_features")}
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths, **nothing})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(folder / "models"))
    register_folder()
    return folder
