"""Members on a Ray cluster: Ray places the workers, one a GPU, starts them again elsewhere when they are lost, and carries
pictures there and back. What a worker does is what any member does; the list of jobs stays here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator

from host import environment
from host.comfy import make_base
from pastiche_client import Refused, ServerError

from . import UserError
from .members import Attached, Made, Own, Stopped

TOOLS = Path(__file__).resolve().parents[1]
LONGEST_START = 360.0  # seconds for Ray to find room and for ComfyUI to start


class OnRay:
    """A member whose ComfyUI a Ray worker attaches to, or starts. Its address is the one that the worker sees."""

    def __init__(self, ray, actor, number: int):
        self._ray, self._actor = ray, actor
        self._stopping = threading.Event()
        self.name = self._plain = f"worker {number}"

    def open(self) -> None:
        self.name = f"{self._plain} ({self._get(self._actor.open.remote(), LONGEST_START)})"

    def upload(self, data: bytes, name: str) -> str:
        return self._get(self._actor.upload.remote(data, name))

    def picture(self, prompt: dict, result: str) -> Made:
        return self._get(self._actor.picture.remote(prompt, result))

    def halt(self) -> None:
        self._stopping.set()
        self._actor.halt.remote()

    def end(self) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            self._ray.get(self._actor.end.remote(), timeout=10)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)

    def _get(self, reference, longest: float = float("inf")) -> Any:
        """What the worker answers. Raises what it raised, Stopped, or ServerError when it is lost."""
        errors, deadline = self._ray.exceptions, time.monotonic() + longest
        while not self._ray.wait([reference], timeout=0.5)[0]:
            if self._stopping.is_set():
                self._ray.wait([reference], timeout=10)  # it cancels its prompt
                raise Stopped("stopped")
            if time.monotonic() > deadline:
                raise ServerError(f"the cluster had no room for it within {longest:.0f} s")
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise ServerError(f"the Ray worker was lost: {str(error).strip().splitlines()[0]}") from None


def _worker():
    """The class of the workers; made in a function, so that Ray sends it whole and it finds our modules by itself."""

    class Worker:
        def __init__(self, tools: str, url: str | None, cpu: bool, timeout: float):
            self._settings = tools, url, cpu, timeout
            self._member = None

        def open(self) -> str:
            tools, *settings = self._settings
            if tools not in sys.path:
                sys.path.insert(0, tools)
            if self._member is None:
                from restyling.on_ray import make_member

                self._member = make_member(*settings)
            self._member.open()
            return f"process {os.getpid()} on {socket.gethostname()}"

        def upload(self, data: bytes, name: str) -> str:
            return self._member.upload(data, name)

        def picture(self, prompt: dict, result: str):
            return self._member.picture(prompt, result)

        def halt(self) -> None:
            if self._member is not None:
                self._member.halt()

        def end(self) -> None:
            if self._member is not None:
                self._member.end()

    return Worker


def make_member(url: str | None, cpu: bool, timeout: float) -> Attached:
    """In a worker: what it attaches to, or a ComfyUI of its own (COMFYUI_PATH of that machine, or .environment/)."""
    if url is not None:
        return Attached(url, timeout)
    try:
        host = environment.prepare()
    except environment.SetupError as error:
        raise Refused(f"no ComfyUI there: {error}") from None
    return Own(host, make_base(Path(tempfile.mkdtemp(prefix="pastiche-restyle-"))), cpu, timeout)


@contextlib.contextmanager
def on_ray(address: str, urls: list[str], workers: int | None, timeout: float) -> Iterator[list[OnRay]]:
    """Workers on the cluster at `address`, "local" for one on this machine: one for each of `urls`, else one a GPU."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start tells nobody of itself
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local" and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # its ports are open to the network
    try:
        import ray  # reads these
    except ImportError:
        raise UserError(
            "--ray needs Ray in this Python and in that of the cluster: pip install ray, the same version in both"
        ) from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"num_cpus": max(len(urls), workers or 1), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise UserError(f"--ray {address}: {str(error).strip() or type(error).__name__}. A cluster with tokens wants RAY_AUTH_MODE=token.") from None
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if urls:
            needs, places = {"num_cpus": 0}, urls[:workers]
        else:
            needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
            machines = sum(bool(node["Alive"]) for node in ray.nodes())
            places = [None] * (workers or gpus or machines)
        # what is lost is started again; its job is not: the list here knows about it
        remote = ray.remote(_worker()).options(**needs, max_restarts=-1, max_task_retries=0, max_concurrency=4, scheduling_strategy="SPREAD")
        yield [OnRay(ray, remote.remote(str(TOOLS), url, not gpus, timeout), number) for number, url in enumerate(places, 1)]
    finally:
        ray.shutdown()
