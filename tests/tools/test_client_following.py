"""The client's way with its own prompts: what it cancels, what it asks for when it hears nothing."""

import threading

import pastiche_client
import pytest
from pastiche_client import ComfyUI, Failed, Interrupted, Refused, ServerError
from support.stand_in import StandIn, made_of


def prompt(image="a.png"):
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": image}, "_meta": {"title": "Content"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Result"}},
    }


def start(delay=0.0, **options):
    server = StandIn(delay, **options)
    server.inputs["a.png"] = b"picture"
    return server


def test_bytes_are_uploaded_and_results_fetched():
    with start() as server:
        comfy = ComfyUI(server.url)
        assert comfy.upload(b"some bytes\r\n--x", "mine.png") == "mine.png" and server.inputs["mine.png"] == b"some bytes\r\n--x"
        steps = []
        result = comfy.run(prompt("mine.png"), steps.append)
        assert [step.title for step in steps] == ["Content", "Result"]
        assert made_of(comfy.fetch(result.images[0])) == "mine.png"


def test_an_error_while_following_cancels_this_prompt_only():
    with start(30) as server:
        comfy = ComfyUI(server.url)

        def stop(step):
            if step.title == "Result":
                server.queue(prompt(), "theirs", "they")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            comfy.run(prompt(), stop)
        (mine, theirs) = server.prompts
        assert server.interrupts == [mine] and theirs == "theirs" and "theirs" in [entry[1] for entry in server._pending + server._running]


def test_cancel_takes_a_waiting_prompt_out_of_the_queue():
    with start(30) as server:
        server.queue(prompt(), "theirs", "they")
        server.queue(prompt(), "mine", "me")
        ComfyUI(server.url).cancel("mine")
        assert not server._pending and not server.interrupts


def test_a_lost_websocket_is_not_a_lost_prompt():
    server = start(0.3)

    def cut(number):
        for connection, _ in server._sockets.values():
            connection.shutdown(2)

    server.on_prompt = cut
    with server:
        result = ComfyUI(server.url).run(prompt())
        assert len(server.finished) == 1 and made_of(ComfyUI(server.url).fetch(result.images[0])) == "a.png"


def test_what_failed_while_the_websocket_was_lost_is_told():
    server = start()
    server.inputs["a.png"] = b"BROKEN"
    server._send = lambda *_: None  # nothing is ever said
    server.on_prompt = lambda number: [connection.shutdown(2) for connection, _ in server._sockets.values()]
    with server, pytest.raises(Failed, match=r"LoadImage \(Content\): OSError: cannot identify"):
        ComfyUI(server.url).run(prompt())


def test_a_prompt_that_somebody_deletes_is_cancelled(monkeypatch):
    monkeypatch.setattr(pastiche_client, "_SILENCE", 0.1)
    with start(30) as server:
        server.queue(prompt(), "theirs", "they")
        ended = []

        def run():
            try:
                ComfyUI(server.url).run(prompt())
            except ServerError as error:
                ended.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while not (server._running and server._pending):  # theirs is drawn, ours waits
            thread.join(0.01)
        server.delete([entry[1] for entry in server._pending])
        thread.join(10)
        assert isinstance(ended[0], Interrupted) and "deleted" in str(ended[0])


def test_a_silent_server_that_is_at_work_is_waited_for(monkeypatch):
    monkeypatch.setattr(pastiche_client, "_SILENCE", 0.1)
    server = start(1.5)
    server._send = lambda *_: None
    with server:
        assert len(ComfyUI(server.url).run(prompt()).images) == 1


def test_kinds_of_errors():
    with start() as server:
        comfy = ComfyUI(server.url)
        with pytest.raises(Refused, match="/prompt was refused: Invalid image file: b.png"):
            comfy.run(prompt("b.png"))
        server.inputs["c.png"] = b"BROKEN"
        with pytest.raises(Failed, match="Content"):
            comfy.run(prompt("c.png"))
        server.garbage = b"<html>"
        with pytest.raises(ServerError, match="something else than JSON; is http.* a ComfyUI") as caught:
            comfy.get("/queue")
        assert not isinstance(caught.value, (Failed, Refused))
    with pytest.raises(ServerError, match="not answered|no WebSocket"):
        comfy.run(prompt())
