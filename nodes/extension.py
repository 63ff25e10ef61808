"""The pack's one ComfyExtension: a literal list of its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import ComparePictures
from .fastsam import FastSAMPrompt, LoadFastSAM
from .feature_injection import FeatureInjection
from .features import CaptureFeatures, LoadFeatures, SaveFeatures
from .frames import RestyleFrames
from .host.fastsam.model import register_fastsam_folder
from .host.features.library import register_folder
from .host.files import remove_partial_files
from .host.trajectories.found_again import empty_with_comfyui
from .injectfusion import HSpaceSlerp, InjectFusionSampler
from .inversion import DDIMInversion, DDIMSampler, InversionReport, MidpointSampler
from .library import ManageStyles, SaveStyleLoRA, StyleLibrary
from .mini import LoadMini
from .samples import SamplePicture
from .multistyle import MultiStyleGuiderNode, StyleEntryNode
from .views import FeaturePCA, StyleSimilarity
from .style_reference import StyleReference
from .styleid import LatentAdaIN, StyleInjection
from .training import TrainStyleLoRA
from .keep_outside import KeepOutside
from .unconditional import LoadUnconditional


class PasticheExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folder()
        register_fastsam_folder()
        remove_partial_files()
        empty_with_comfyui()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            DDIMInversion,
            InversionReport,
            MidpointSampler,
            DDIMSampler,
            LatentAdaIN,
            CaptureFeatures,
            SaveFeatures,
            LoadFeatures,
            StyleLibrary,
            SaveStyleLoRA,
            ManageStyles,
            StyleInjection,
            StyleReference,
            RestyleFrames,
            FeaturePCA,
            StyleSimilarity,
            ComparePictures,
            HSpaceSlerp,
            InjectFusionSampler,
            LoadUnconditional,
            LoadMini,
            SamplePicture,
            TrainStyleLoRA,
            FeatureInjection,
            KeepOutside,
            StyleEntryNode,
            MultiStyleGuiderNode,
            LoadFastSAM,
            FastSAMPrompt,
        ]


async def comfy_entrypoint() -> PasticheExtension:
    return PasticheExtension()
