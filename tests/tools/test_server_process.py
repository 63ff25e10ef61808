"""Starting and stopping: a stand-in main.py in place of ComfyUI shows what happens when things go wrong."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host.comfy import PACK, Server, ServerError, make_base
from host.environment import ROOT, Host


def make_host(folder, main):
    (folder / "comfyui").mkdir()
    (folder / "comfyui" / "main.py").write_text(main)
    return Host(folder / "comfyui", Path(sys.executable), False)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc/self").exists() else True


def test_base_directory_has_the_pack_and_can_be_made_twice(tmp_path):
    for _ in range(2):
        base = make_base(tmp_path / "base")
        assert (base / "custom_nodes" / PACK / "__init__.py").samefile(ROOT / "__init__.py")
    assert not (make_base(tmp_path / "bare", pack=False) / "custom_nodes" / PACK).exists()


def test_a_server_that_dies_shows_its_log(tmp_path):
    host = make_host(tmp_path, "print('loading'); raise SystemExit('CUDA is on fire')")
    server = Server(host, make_base(tmp_path / "base"))
    with pytest.raises(ServerError, match=r"(?s)ended unexpectedly \(exit status 1\).*CUDA is on fire"):
        server.start()
    assert server.pid is None


def test_a_taken_port_is_told_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is taken.*--port"):
            Server(make_host(tmp_path, ""), make_base(tmp_path / "base"), port).start()


@pytest.mark.skipif(os.name == "nt", reason="POSIX processes")
@pytest.mark.parametrize("stubborn", [False, True])
def test_nothing_is_left_of_a_server_or_its_children(tmp_path, stubborn):
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else ""
    main = f"""
import http.server, os, signal, subprocess, sys
{ignore}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / 'pids')!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Ready).serve_forever()
"""
    with pytest.raises(KeyboardInterrupt), Server(make_host(tmp_path, main), make_base(tmp_path / "base")):
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(alive(pid) for pid in pids)
        raise KeyboardInterrupt
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="a service of Linux")
def test_the_server_dies_with_a_program_that_is_killed(tmp_path):
    host = make_host(tmp_path, "import time; time.sleep(600)")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})
from pathlib import Path
from host.comfy import Server, make_base
from host.environment import Host
import threading, time
server = Server(Host(Path({str(host.comfyui)!r}), Path(sys.executable), False), make_base(Path({str(tmp_path / 'base')!r})))
threading.Thread(target=lambda: (time.sleep(1), print(server.pid, flush=True)), daemon=True).start()
server.start()
"""
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(program.stdout.readline())
    assert alive(pid)
    program.kill()
    program.wait()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_server_that_never_answers_is_given_up(tmp_path):
    server = Server(make_host(tmp_path, "import time; print('thinking', flush=True); time.sleep(600)"), make_base(tmp_path / "base"))
    with pytest.raises(ServerError, match="(?s)did not answer within 1 s.*thinking"):
        server.start(timeout=1)
    assert server.pid is None
