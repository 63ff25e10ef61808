"""ComfyUI for the tools and the tests: environment, server, browser. The client is the one that ships with the graphs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "workflows" / "api"))  # pastiche_client
