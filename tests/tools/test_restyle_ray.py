"""tools/restyle.py --ray: a local Ray, workers that attach to stand-ins for ComfyUI or start them, one killed on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import restyle
from host import environment
from PIL import Image
from restyling import UserError
from support.stand_in import StandIn, made_of

# in CI it has to be there, where there are wheels of it
if not (environment.IN_CI and sys.version_info < (3, 15)):
    pytest.importorskip("ray")
SCRIPT = environment.ROOT / "tools" / "restyle.py"
VARIABLES = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture
def arguments(tmp_path):
    for kind, names in (("contents", "abcd"), ("styles", "xy")):
        (tmp_path / kind).mkdir()
        for number, name in enumerate(names):
            Image.new("RGB", (4, 4), (number, len(kind), 9)).save(tmp_path / kind / f"{name}.png")
    return [str(tmp_path / "contents"), str(tmp_path / "styles"), "--output", str(tmp_path / "out"), "--ray"]


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster that somebody else has started."""
    code = ("import ray; print(ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR', "
            "_node_ip_address='127.0.0.1').address_info['gcs_address'], flush=True); input()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=VARIABLES)
    yield process.stdout.readline().strip()
    process.communicate("\n", timeout=60)


def journal(out):
    text = (out / "restyle.jsonl").read_text() if (out / "restyle.jsonl").is_file() else ""
    return [line for line in map(json.loads, text.splitlines()) if "name" in line]


def kill_first_worker(out):
    """As soon as a picture of its is there. The list gets the process id that was killed."""
    killed = []

    def act():
        while not journal(out):
            time.sleep(0.02)
        pid = int(re.search(r"process (\d+)", journal(out)[0]["server"])[1])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    threading.Thread(target=act, daemon=True).start()
    return killed


def check(out):
    made = journal(out)
    assert Counter((line["content"], line["style"]) for line in made) == Counter((f"{c}.png", f"{s}.png") for c in "abcd" for s in "xy")
    pictures = {path.name: made_of(path.read_bytes()) for path in out.glob("*.png")}
    assert set(pictures) == {f"{c}_{s}.png" for c in "abcd" for s in "xy"} and len(set(pictures.values())) == 8
    return made


def test_a_cluster_that_is_none_is_one_sentence(arguments):
    with pytest.raises(UserError, match="--ray nonsense: "):
        restyle.main([*arguments, "nonsense"])


def start(arguments, *more, variables=VARIABLES):
    """The command in a process of its own: Ray reads its settings once a process."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_killed_workers_pictures_go_on_elsewhere(cluster, arguments, tmp_path):
    with StandIn(0.3) as first, StandIn(0.3) as second:
        killed = kill_first_worker(tmp_path / "out")
        process = start(arguments, cluster, "--servers", f"{first.url},{second.url}")
        said, wrong = process.communicate(timeout=200)
    assert process.returncode == 0, said + wrong
    made = check(tmp_path / "out")
    assert killed and sum(f"process {killed[0]} " in line["server"] for line in made) in range(1, 8)
    assert len({line["server"] for line in made}) >= 2
    assert "was lost, its pictures go to the others" in said and "8 made" in said
    for server in (first, second):
        assert set(server.interrupts) <= set(server.prompts)


def test_workers_start_a_comfyui_each_which_dies_with_them(arguments, tmp_path):
    comfy = tmp_path / "ComfyUI"
    (comfy / "comfy").mkdir(parents=True)
    (comfy / "main.py").write_text(
        f"import os, sys, threading; sys.path.insert(0, {str(environment.ROOT / 'tests')!r})\n"
        "from support.stand_in import StandIn\n"
        f"open(os.path.join({str(tmp_path)!r}, f'{{os.getppid()}}-{{os.getpid()}}.started'), 'w').close()\n"
        "with StandIn(0.3, port=int(sys.argv[sys.argv.index('--port') + 1])):\n    threading.Event().wait()\n"
    )
    killed = kill_first_worker(tmp_path / "out")
    process = start(arguments, "local", "--workers", "2", variables={**os.environ, "COMFYUI_PATH": str(comfy), "COMFYUI_PYTHON": sys.executable})
    said, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, said + wrong
    check(tmp_path / "out")
    started = [tuple(map(int, path.stem.split("-"))) for path in tmp_path.glob("*.started")]
    assert killed and len(started) >= 2 and killed[0] in {parent for parent, _ in started}
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for _, pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for _, pid in started)


def test_ctrl_c_cancels_what_workers_queued(cluster, arguments, tmp_path):
    begun = threading.Event()
    with StandIn(60, lambda number: begun.set()) as server:
        process = start(arguments, cluster, "--servers", server.url)
        assert begun.wait(120)
        process.send_signal(signal.SIGINT)
        said, wrong = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in wrong, wrong
        assert server.interrupts == list(server.prompts) and len(server.prompts) == 1 and not server._pending
    assert not list((tmp_path / "out").glob("*.png"))


def test_without_ray_one_sentence_tells_what_to_install(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        restyle.main([*arguments, "local"])
