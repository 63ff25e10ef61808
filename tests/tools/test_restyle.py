"""Many pictures through stand-ins for ComfyUI: what is lost, stopped, broken or refused, every picture is made once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import restyle
from host import environment
from PIL import Image
from restyling import UserError
from support.stand_in import StandIn, made_of

SCRIPT = environment.ROOT / "tools" / "restyle.py"


def make_pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (4, 3), (number, len(name), ord(name[0]) % 256)).save(folder / name)
    return folder


@pytest.fixture
def folders(tmp_path):
    contents = make_pictures(tmp_path / "contents", "a.png", "b.jpg", "c.png", "d.webp", "e.png")
    styles = make_pictures(tmp_path / "styles", "x.png", "y.png", "z.jpg")
    return contents, styles


def command(folders, tmp_path, *servers, more=()):
    return [*map(str, folders), "--servers", ",".join(server if isinstance(server, str) else server.url for server in servers),
            "--output", str(tmp_path / "out"), *more]


def uploaded(folder: Path) -> dict[str, str]:
    """Names on the server by names of files."""
    from restyling.pairs import Picture

    return {path.name: Picture(path).upload_name() for path in folder.iterdir()}


def check_all_made(folders, out: Path, *servers, once: bool = True) -> None:
    """Every pair has its file, made of that pair; together the servers finished each once."""
    contents, styles = map(uploaded, folders)
    for content, content_name in contents.items():
        for style, style_name in styles.items():
            assert made_of((out / f"{Path(content).stem}_{Path(style).stem}.png").read_bytes()) == f"{content_name}+{style_name}"
    assert len(list(out.glob("*.png"))) == len(contents) * len(styles) and not list(out.glob("*.part"))
    lines = journal(out)
    assert Counter((line["content"], line["style"]) for line in lines) == Counter((c, s) for c in contents for s in styles)
    if once:
        finished = Counter(pair for server in servers for pair in server.finished)
        assert finished == Counter(f"{c}+{s}" for c in contents.values() for s in styles.values())


def journal(out: Path) -> list[dict]:
    return [line for line in map(json.loads, (out / "restyle.jsonl").read_text().splitlines()) if "name" in line]


def test_every_content_with_every_style_each_inverted_once(folders, tmp_path, capsys):
    with StandIn() as server:
        assert restyle.main(command(folders, tmp_path, server)) == 0
    check_all_made(folders, tmp_path / "out", server)
    contents, styles = map(uploaded, folders)
    ran = Counter(server.ran)
    assert {pictures: count for (title, pictures), count in ran.items() if title == "Invert content"} == dict.fromkeys(contents.values(), 1)
    assert {pictures: count for (title, pictures), count in ran.items() if title == "Invert style"} == dict.fromkeys(styles.values(), 1)
    assert sum(count for (title, _), count in ran.items() if title == "Sample") == 15
    assert len(server.inputs) == 8
    said = capsys.readouterr()
    assert "15/15" in said.out and "15 made" in said.out and "0 failed, 0 not tried" in said.out and not said.err
    with Image.open(tmp_path / "out" / "contact_sheet.jpg") as sheet:
        assert sheet.size == (6 + 4 * 166, 6 + 6 * 150)


def test_more_styles_than_contents_and_few_kept(folders, tmp_path):
    """Contents are fewer then: they ride along, at most two at a time, so that styles are inverted once for every two."""
    with StandIn() as server:
        assert restyle.main(command(folders[::-1], tmp_path, server, more=["--keep", "2"])) == 0
    contents, styles = map(uploaded, folders[::-1])
    ran = Counter(server.ran)
    assert {pictures: count for (title, pictures), count in ran.items() if title == "Invert content"} == dict.fromkeys(contents.values(), 1)
    assert {pictures: count for (title, pictures), count in ran.items() if title == "Invert style"} == dict.fromkeys(styles.values(), 2)


def test_styles_of_the_servers_library_are_named_and_ride_along(folders, tmp_path, capsys):
    """Two of one last name, too; nothing is uploaded for them."""
    contents, styles = folders[0], ["ready/comic", "features/comic", "ready/woodcut"]
    arguments = [str(contents), "library:" + " , ".join(styles), "--output", str(tmp_path / "out"), "--servers"]
    with StandIn() as server:
        assert restyle.main([*arguments, server.url]) == 0
        assert restyle.main([*arguments, server.url]) == 0
    names = uploaded(contents)
    assert Counter(server.finished) == Counter(f"{content}+{style}" for content in names.values() for style in styles)
    assert sorted(server.inputs) == sorted(names.values())
    library = Counter(pictures for title, pictures in server.ran if title == "Style library")
    assert library == Counter(styles)
    made = {(line["content"], line["style"]): tmp_path / "out" / f"{line['name']}.png" for line in journal(tmp_path / "out")}
    assert len(made) == len(set(made.values())) == 15
    for (content, style), path in made.items():
        assert made_of(path.read_bytes()) == f"{names[content]}+{style}"
    assert (tmp_path / "out" / "a_woodcut.png").is_file() and "15 of them finished before" in capsys.readouterr().out


@pytest.mark.parametrize(("styles", "workflow", "words"), [
    ("library: ,", "choose_style_mini", "names no style"),
    ("library:ready/comic", "styleid_mini", "takes pictures for styles"),
    ("styles", "choose_style_mini", "takes styles of the library"),
])
def test_pictures_and_styles_of_the_library_are_not_mixed_up(folders, tmp_path, styles, workflow, words):
    given = [str(folders[0]), str(folders[1]) if styles == "styles" else styles]
    with pytest.raises(UserError, match=words):
        restyle.main([*given, "--workflow", workflow, "--servers", "http://127.0.0.1:1", "--output", str(tmp_path / "out")])


def test_a_lost_servers_job_goes_elsewhere(folders, tmp_path, capsys):
    with StandIn(0.02) as first:
        second = StandIn(0.02, lambda number: second.die() if number == 4 else None)
        with second:
            assert restyle.main(command(folders, tmp_path, first, second, more=["--patience", "1"])) == 0
    assert len(second.finished) >= 3  # it may have computed the fourth, which nobody could fetch
    check_all_made(folders, tmp_path / "out", first, second, once=False)
    made = Counter(line["server"] for line in journal(tmp_path / "out"))
    assert made == {first.url: 12, second.url: 3}
    assert f"{second.url} was lost" in capsys.readouterr().out
    for server in (first, second):
        ran = Counter(server.ran)
        assert max(count for (title, _), count in ran.items() if title.startswith("Invert")) == 1


def test_a_server_that_comes_back_goes_on(folders, tmp_path, capsys):
    first = StandIn(0.02, lambda number: first.die() if number == 4 else None)
    reborn = []

    def rise():
        while first._alive:
            time.sleep(0.01)
        time.sleep(0.3)
        reborn.append(StandIn(port=first.port).__enter__())

    with first:
        thread = threading.Thread(target=rise)
        thread.start()
        code = restyle.main(command(folders, tmp_path, first, more=["--patience", "20"]))
        thread.join()
    assert code == 0
    check_all_made(folders, tmp_path / "out", once=False)
    assert len(reborn[0].inputs) > 0 and len(reborn[0].finished) == 12  # pictures went up again; three were fetched before
    reborn[0].die()


def test_all_servers_lost_ends_with_a_state_that_goes_on(folders, tmp_path, capsys):
    server = StandIn(on_prompt=lambda number: server.die() if number == 6 else None)
    with server:
        assert restyle.main(command(folders, tmp_path, server, more=["--patience", "0.6"])) == 1
    said = capsys.readouterr()
    assert "could not be reached" in said.out and "5 made" in said.out and "10 not tried" in said.out
    out = tmp_path / "out"
    (out / ".restyle-0123.part").write_bytes(b"half")
    with open(out / "restyle.jsonl", "a") as file:
        file.write('{"name": "torn')
    with StandIn() as other:
        assert restyle.main(command(folders, tmp_path, other)) == 0
    assert len(other.finished) == 10
    lines = [line for line in (out / "restyle.jsonl").read_text().splitlines() if not line.endswith("torn")]
    assert len([line for line in map(json.loads, lines) if "name" in line]) == 15
    assert len(list(out.glob("*.png"))) == 15 and not list(out.glob("*.part")) and not list(out.glob(".*.part"))
    capsys.readouterr()
    with StandIn() as third:  # nothing left to do: nobody is asked
        assert restyle.main(command(folders, tmp_path, third)) == 0
    assert not third.prompts and "15 of them finished before" in capsys.readouterr().out


def test_other_settings_do_not_mix(folders, tmp_path):
    with StandIn() as server:
        assert restyle.main(command(folders, tmp_path, server)) == 0
        with pytest.raises(UserError, match="made with another workflow or other settings.*--output"):
            restyle.main(command(folders, tmp_path, server, more=["--set", "Style injection.gamma=0.3"]))
        assert len(server.finished) == 15


def test_one_run_at_a_time_writes_into_a_folder(folders, tmp_path):
    from restyling.results import Results

    with Results(tmp_path / "out"), StandIn() as server:
        with pytest.raises(UserError, match="another restyle.py"):
            restyle.main(command(folders, tmp_path, server))


def test_an_unreadable_picture_costs_only_its_own_pairs(folders, tmp_path, capsys):
    (folders[0] / "b.jpg").write_bytes(b"no picture")
    with StandIn() as server:
        assert restyle.main(command(folders, tmp_path, server)) == 1
    said = capsys.readouterr()
    assert said.err.count("failed: b.jpg with ") == 3 and said.err.count("cannot be read as a picture") == 3
    assert len(server.finished) == 12 and "12 made" in said.out and "3 failed" in said.out


def test_what_fails_on_one_server_is_tried_on_another_and_told_once(folders, tmp_path, capsys):
    with StandIn() as first, StandIn(0.01) as second:
        broken = uploaded(folders[0])["c.png"]

        class Broken(dict):
            def get(self, name, default=None):
                return b"BROKEN" if name == broken else dict.get(self, name, default)

        first.inputs, second.inputs = Broken(), Broken()
        assert restyle.main(command(folders, tmp_path, first, second)) == 1
    said = capsys.readouterr()
    assert said.err.count("failed: c.png with ") == 3
    assert "(Content): OSError: cannot identify image file" in said.err  # the node's class and title, and its message
    assert len(first.finished) + len(second.finished) == 12 and "12 made" in said.out
    tried = Counter(json.dumps(prompt, sort_keys=True).count(broken) > 0 for server in (first, second) for prompt in server.prompts.values())
    assert tried[True] == 6


def test_a_picture_that_takes_servers_down_is_given_up(folders, tmp_path, capsys):
    """Each time somebody starts the server anew."""
    for path in [folders[1] / "y.png", folders[1] / "z.jpg"]:
        path.unlink()
    servers = []

    def start(port=0):
        server = StandIn(0.01, port=port)
        servers.append(server)
        poison = uploaded(folders[0])["a.png"]

        def act(number):
            if poison in json.dumps(list(server.prompts.values())[-1]):
                server.die()
                time.sleep(0.05)
                start(server.port)

        server.on_prompt = act
        return server.__enter__()

    first = start()
    code = restyle.main(command(folders, tmp_path, first, more=["--patience", "10"]))
    servers[-1].die()
    said = capsys.readouterr()
    assert code == 1 and said.err.count("failed: ") == 1 and "failed: a.png with x.png: the server was lost 3 times over it" in said.err
    assert "4 made" in said.out and len(servers) == 4


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"[]", b"\xff\xfe", b""])
def test_a_server_that_answers_garbage_is_left_out(folders, tmp_path, capsys, answer):
    with StandIn() as good, StandIn() as bad:
        bad.garbage = answer
        assert restyle.main(command(folders, tmp_path, bad, good, more=["--patience", "0.5"])) == 0
        check_all_made(folders, tmp_path / "out", good)
    assert not bad.prompts


def test_a_server_that_refuses_the_workflow_is_left_out(folders, tmp_path, capsys):
    with StandIn() as good, StandIn() as bad:
        bad.refuses = "Cannot execute because node PasticheStyleInjection does not exist."
        assert restyle.main(command(folders, tmp_path, bad, good)) == 0
        check_all_made(folders, tmp_path / "out", good)
        said = capsys.readouterr().out
        assert f"{bad.url} is left out: /prompt was refused: Cannot execute" in said
        assert restyle.main([*command(folders, tmp_path, bad)[:-1], str(tmp_path / "other")]) == 1
        assert "0 made" in capsys.readouterr().out


def test_an_emptied_input_folder_is_filled_again(folders, tmp_path):
    server = StandIn()
    server.on_prompt = lambda number: number == 5 and threading.Timer(0, server.inputs.clear).start()
    with server:
        assert restyle.main(command(folders, tmp_path, server)) == 0
    check_all_made(folders, tmp_path / "out", server)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_cancels_only_what_it_queued(folders, tmp_path):
    """Somebody else's prompts on the same server, one of them running, stay as they are."""
    begun = threading.Event()
    with StandIn(30, lambda number: begun.set()) as server:
        theirs = {"1": {"class_type": "SaveImage", "inputs": {}, "_meta": {"title": "theirs"}}}
        server.queue(theirs, "their-running", "they")
        begun.wait(5)
        server.queue(theirs, "their-pending", "they")
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *command(folders, tmp_path, server)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 30
        while len(server._pending) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)
        assert process.returncode == 130 and "15 not tried" in said[0] and "Traceback" not in said[1] and "goes on where" in said[1]
        assert [entry[1] for entry in server._pending] == ["their-pending"] and [entry[1] for entry in server._running] == ["their-running"]
        assert not server.interrupts


def test_ctrl_c_interrupts_the_prompt_that_runs(folders, tmp_path, monkeypatch):
    begun = threading.Event()

    def press(self, servers=None):
        if begun.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr("restyling.progress.ProgressLine.draw", press)
    with StandIn(30, lambda number: begun.set()) as server:
        with pytest.raises(KeyboardInterrupt):
            restyle.main(command(folders, tmp_path, server))
        assert server.interrupts == list(server.prompts) and not server._pending
    assert not list((tmp_path / "out").glob("*.png"))


def test_results_do_not_go_where_pictures_come_from(folders):
    with pytest.raises(UserError, match="--output is .* itself"):
        restyle.main([*map(str, folders), "--servers", "http://127.0.0.1:9", "--output", str(folders[0])])


@pytest.mark.parametrize("servers, words", [("127.0.0.1:8188", "not an address such as"), ("https://x", "https is not supported")])
def test_addresses_that_are_none(folders, tmp_path, servers, words):
    with pytest.raises(UserError, match=words):
        restyle.main(command(folders, tmp_path, servers))


@pytest.mark.parametrize("wrong", [["--servers", " , "], ["--servers", "http://a,http://a/"], ["--keep", "0"], ["--workers", "2"]])
def test_command_lines_that_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        restyle.parse(["a", "b", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_what_a_lost_server_still_computes_is_cancelled_when_it_is_back(folders, tmp_path, capsys):
    for path in [*folders[0].glob("[b-e].*"), *folders[1].glob("[yz].*")]:
        path.unlink()
    server = StandIn(30)

    def vanish(number):
        if number == 1:
            server.garbage = b"away"
            for connection, _ in list(server._sockets.values()):
                connection.shutdown(2)
            threading.Timer(1.5, come_back).start()

    def come_back():
        server.garbage, server.delay = None, 0

    server.on_prompt = vanish
    with server:
        assert restyle.main(command(folders, tmp_path, server)) == 0
    first, second = server.prompts
    assert server.interrupts == [first] and len(server.finished) == 1
    check_all_made(folders, tmp_path / "out", server)


@pytest.mark.parametrize("data", [b"GIF89a" + bytes(90), b"\x89PNG\r\n\x1a\n" + bytes(90)], ids=["no PNG", "half a PNG"])
def test_a_result_that_is_no_whole_png_is_a_failure(folders, tmp_path, capsys, monkeypatch, data):
    monkeypatch.setattr("support.stand_in.png", lambda text: data)
    with StandIn() as server:
        assert restyle.main(command(folders, tmp_path, server)) == 1
    assert capsys.readouterr().err.count("is no whole PNG file") == 15 and not list((tmp_path / "out").glob("*.png"))


def test_without_servers_it_starts_one_and_leaves_nothing(folders, tmp_path):
    """The ComfyUI named by COMFYUI_PATH: here a stand-in."""
    comfy = tmp_path / "ComfyUI"
    (comfy / "comfy").mkdir(parents=True)
    stand_in = environment.ROOT / "tests" / "support" / "stand_in.py"
    (comfy / "main.py").write_text(
        f"import os, runpy\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nrunpy.run_path({str(stand_in)!r}, run_name='__main__')\n"
    )
    variables = {**os.environ, "COMFYUI_PATH": str(comfy), "COMFYUI_PYTHON": sys.executable, "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, folders), "--output", str(tmp_path / "out")], env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "15 made" in done.stdout, done.stderr
    check_all_made(folders, tmp_path / "out", once=False)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    assert not list((tmp_path / "temporary").glob("pastiche-*"))


def test_a_python_without_any_package_is_enough(folders, tmp_path):
    (folders[0] / "b.jpg").write_bytes(b"BROKEN")  # the server says so, then
    with StandIn() as server:
        done = subprocess.run([sys.executable, "-S", str(SCRIPT), *command(folders, tmp_path, server)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "12 made" in done.stdout and "none: it needs Pillow" in done.stdout, done.stderr
    assert done.stderr.count("failed: b.jpg with ") == done.stderr.count("cannot identify image file") == 3 and "Traceback" not in done.stderr
