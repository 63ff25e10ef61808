"""tools/restyling's bookkeeping: names, pairs, rows, the list of jobs, the prompt of a pair, time left."""

import json
import random
import threading
import unicodedata

import pytest
from pastiche_client import load
from restyling import UserError
from restyling.jobs import Jobs
from restyling.pairs import Job, Picture, all_pairs, in_rows, name_jobs, pairs_from, pictures
from restyling.progress import ProgressLine, duration
from restyling.recipe import make_recipe


def some(folder, *names):
    return {name: Picture(folder / name) for name in names}


def names(jobs):
    return {(job.content.name, job.style.name): job.name for job in jobs}


# ---- names ----


def test_names_join_content_and_style(tmp_path):
    named = names(name_jobs(all_pairs(some(tmp_path, "Käse 1.jpg", "写真.png"), some(tmp_path, "x.y.png")), {}))
    assert named == {("Käse 1.jpg", "x.y.png"): "Käse 1_x.y", ("写真.png", "x.y.png"): "写真_x.y"}


@pytest.mark.parametrize(
    "contents, styles",
    [
        (["a.png", "a.jpg"], ["x.png"]),  # one stem
        (["A.png", "a.png"], ["x.png"]),  # one name where case does not count
        (["a.png", "a_b.png"], ["b_c.png", "c.png"]),  # a + b_c, a_b + c
        ([unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")], ["x.png"]),
        (["n" * 150 + "1.png", "n" * 150 + "2.png"], ["s" * 90 + ".png"]),  # cut to one length
        (["写" * 80 + ".png"], ["真" * 80 + ".png"]),
    ],
)
def test_names_that_would_collide_are_all_different_and_fit(tmp_path, contents, styles):
    pairs = all_pairs(some(tmp_path, *contents), some(tmp_path, *styles))
    named = names(name_jobs(pairs, {}))
    folded = {unicodedata.normalize("NFC", name).casefold() for name in named.values()}
    assert len(folded) == len(pairs) == len(contents) * len(styles)
    assert all(len(f"{name}.png".encode()) <= 255 for name in named.values())
    assert named == names(name_jobs(reversed(pairs), {}))


def test_a_name_once_given_stays(tmp_path):
    first = names(name_jobs(all_pairs(some(tmp_path, "a.png"), some(tmp_path, "x.png")), {}))
    later = names(name_jobs(all_pairs(some(tmp_path, "a.jpg", "a.png"), some(tmp_path, "x.png")), first))
    assert later["a.png", "x.png"] == "a_x" and later["a.jpg", "x.png"] not in ("a_x", None)
    # also when the first pair is not part of the run
    assert names(name_jobs(all_pairs(some(tmp_path, "a.jpg"), some(tmp_path, "x.png")), first)) == {("a.jpg", "x.png"): later["a.jpg", "x.png"]}


def test_a_forged_record_names_nothing(tmp_path):
    pairs = all_pairs(some(tmp_path, "a.png"), some(tmp_path, "x.png"))
    for forged in ("../../evil", "/etc/passwd", "b_x", "a_x_00000000"):
        assert names(name_jobs(pairs, {("a.png", "x.png"): forged})) == {("a.png", "x.png"): "a_x"}


# ---- folders and CSV ----


def test_a_folder_gives_its_own_pictures_only(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "clip.gif"):
        (folder / name).touch()
    (folder / "sub.png").mkdir()
    (tmp_path / "secret.png").touch()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to(folder / "b.png")
    told = []
    assert list(pictures(folder, told.append)) == ["a.JPG", "b.png", "inside.png"]
    assert "left out clip.gif, notes.txt" in told[0] and "link.png, links out of the folder" in told[1]
    assert list(pictures(folder / "b.png")) == ["b.png"]
    with pytest.raises(UserError, match="neither a folder nor a file"):
        pictures(tmp_path / "none")
    with pytest.raises(UserError, match="has no pictures"):
        pictures(folder / "sub.png")


@pytest.mark.parametrize("text", ["content,style\na.png,é.png\nb.png,é.png\n", "\ufeffContent, Style\r\na.png , é.png\r\n\r\nb.png,é.png\r\nb.png,é.png",
                                  "a.png,é.png\n\"b.png\",\"é.png\""])
def test_pairs_from_csv(tmp_path, text):
    contents, styles = some(tmp_path, "a.png", "b.png"), some(tmp_path, unicodedata.normalize("NFD", "é.png"))
    (tmp_path / "p.csv").write_bytes(text.encode())
    found = pairs_from(tmp_path / "p.csv", contents, styles)
    assert [(content.name[0], style.name[0]) for content, style in found] == [("a", "e"), ("b", "e")]


@pytest.mark.parametrize(
    "text, words",
    [
        ("../a.png,x.png", r"line 1: '\.\./a\.png' is not the name of a picture of the contents"),
        ("/etc/passwd,x.png", "'/etc/passwd' is not the name"),
        ("a.png,x.png\na.png,y.png\n", "line 2: 'y.png' is not the name of a picture of the styles"),
        ("a.png;x.png", "line 1 has 1 columns, not content,style"),
        ("content,style\n", "names no pairs"),
    ],
)
def test_mistakes_in_a_csv(tmp_path, text, words):
    (tmp_path / "a.png").touch()
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        pairs_from(tmp_path / "p.csv", some(tmp_path, "a.png"), some(tmp_path, "x.png"))


def test_a_csv_of_other_bytes(tmp_path):
    (tmp_path / "p.csv").write_bytes("é.png,x.png".encode("latin-1"))
    with pytest.raises(UserError, match="CSV in UTF-8"):
        pairs_from(tmp_path / "p.csv", {}, {})


# ---- rows and the list ----


def test_rows_are_pictures_of_the_larger_side(tmp_path):
    jobs = name_jobs(all_pairs(some(tmp_path, "a", "b", "c"), some(tmp_path, "x", "y")), {})
    rows, carried = in_rows(jobs, 8)
    assert carried == "style" and [[job.name for job in row] for row in rows] == [["a_x", "a_y"], ["b_x", "b_y"], ["c_x", "c_y"]]
    rows, carried = in_rows(name_jobs(all_pairs(some(tmp_path, "a", "b"), some(tmp_path, "x", "y", "z")), {}), 1)
    assert carried == "content" and [[job.name for job in row] for row in rows] == [["a_x"], ["a_y"], ["a_z"], ["b_x"], ["b_y"], ["b_z"]]


def numbered(*lengths):
    return [[Job(f"{row}.{place}", None, None) for place in range(length)] for row, length in enumerate(lengths)]


def test_a_member_without_rows_takes_half_of_anothers():
    jobs = Jobs(numbered(5))
    jobs.join("a"), jobs.join("b")
    assert jobs.take("a").name == "0.0"
    assert [jobs.take("b").name for _ in range(2)] == ["0.3", "0.4"]
    assert [jobs.take("a").name, jobs.take("b").name] == ["0.1", "0.2"]


def test_a_lost_members_row_goes_on_elsewhere_in_order():
    jobs = Jobs(numbered(3, 1))
    jobs.join("a"), jobs.join("b")
    job = jobs.take("a")
    other = jobs.take("b")
    jobs.done(other)
    jobs.give_back(job, "a", lost="gone")
    taken = []
    for _ in range(3):
        job = jobs.take("b")
        taken.append(job and job.name)
        jobs.done(job)
    assert taken == ["0.0", "0.1", "0.2"] and jobs.take("a") is None


def test_a_failure_is_final_when_nobody_else_can_try():
    jobs = Jobs(numbered(1))
    jobs.join("a"), jobs.join("b")
    job = jobs.take("a")
    assert not jobs.fail(job, "a", "no") and not jobs.failed
    jobs.leave("b")
    assert jobs.failed == [(job, "no")] and jobs.take("a") is None


@pytest.mark.parametrize("seed", range(12))
def test_every_job_ends_once_whatever_happens(seed):
    """Threads that finish, fail, are lost, leave: done and failed are all jobs, each once, unless everybody left."""
    draw = random.Random(seed)
    jobs = Jobs(numbered(*(draw.randrange(1, 6) for _ in range(15))))
    made, lock, stayed = [], threading.Lock(), []

    def work(member, fate):
        while (job := jobs.take(member)) is not None:
            chance = fate.random()
            if chance < 0.7:
                with lock:
                    made.append(job)
                jobs.done(job)
            elif chance < 0.85:
                jobs.fail(job, member, "no")
            elif chance < 0.98 or member == 0:
                jobs.give_back(job, member, lost="gone")
            else:
                jobs.give_back(job, member)
                break
        else:
            stayed.append(member)
        jobs.leave(member)

    for member in range(4):
        jobs.join(member)
    threads = [threading.Thread(target=work, args=(member, random.Random(seed * 10 + member)), daemon=True) for member in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and 0 in stayed
    ended = made + [job for job, _ in jobs.failed]
    assert len(ended) == len({id(job) for job in ended}) == jobs.total and jobs.finished == len(made) and not jobs.waits()


def test_stop_wakes_those_who_wait():
    jobs = Jobs(numbered(1))
    jobs.join("a"), jobs.join("b")
    jobs.take("a")
    thread = threading.Thread(target=jobs.take, args=("b",), daemon=True)
    thread.start()
    jobs.stop()
    thread.join(5)
    assert not thread.is_alive()


# ---- the prompt ----


def test_a_prompt_alone_is_the_workflow_with_two_pictures():
    recipe = make_recipe("styleid_mini")
    prompt = recipe.prompt("c.png", "s.png")
    expected = load("styleid_mini")
    expected.picture("Content", "c.png")
    expected.picture("Style", "s.png")
    styles = {"11", "13", "15", "18"}
    renamed = {key: f"{key}_s" if key in styles else key for key in expected}
    text = {renamed[key]: json.loads(json.dumps(node)) for key, node in expected.items()}
    for node in text.values():
        node["inputs"] = {name: [renamed[value[0]], value[1]] if isinstance(value, list) else value for name, value in node["inputs"].items()}
    assert prompt == text and recipe.result == "26"


def test_passengers_keep_their_ids_and_are_asked_for_by_nothing():
    recipe = make_recipe("styleid_mini")
    first = recipe.prompt("c.png", "s.png")
    prompt = recipe.prompt("c.png", "t.png", kept=["s.png", "t.png"])
    passengers = {key for key in prompt if key.endswith("_s")}
    assert passengers == {"11_s", "13_s", "15_s", "18_s"} and all(prompt[key] == first[key] for key in passengers)
    assert {key: prompt[key] for key in prompt if key not in passengers} == recipe.prompt("c.png", "t.png")


def test_contents_ride_where_they_are_fewer():
    prompt = make_recipe("styleid_mini").prompt("c.png", "s.png", "content", ["d.png"])
    assert {"10_d", "12_d", "14_d", "17_d", "10_c", "17_c", "18"} <= prompt.keys() and "26" in prompt


@pytest.mark.parametrize(
    "name", ["styleid_mini", "styleid", "quick_start_mini", "injectfusion_mini", "diffstyler_mini", "restyle_transformer_mini", "restyle_flux",
             "diffstyler_train_mini"])
def test_shipped_workflows_need_no_titles(name):
    recipe = make_recipe(name)
    prompt = recipe.prompt("c.png", "s.png", kept=["t.png"])
    loaded = sorted(node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage")
    assert loaded == ["c.png", "s.png", "t.png"] and prompt[recipe.result]["class_type"] == "SaveImage"
    assert all(value[0] in prompt for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list) and len(value) == 2)


def test_settings_take_the_type_that_is_there():
    recipe = make_recipe("styleid_mini", ["Style injection.gamma=1", "Style injection.layers=6", "Schedule.steps=4", "Sample.add_noise=true",
                                          "Invert style.memory=disk"])
    titles = recipe.graph.titles
    assert titles["Style injection"]["gamma"] == 1 and titles["Style injection"]["layers"] == "6"
    assert titles["Schedule"]["steps"] == 4 and titles["Sample"]["add_noise"] is True and titles["Invert style"]["memory"] == "disk"


@pytest.mark.parametrize(
    "settings, words",
    [
        (["gamma=1"], 'not of the form "Title.input=value"'),
        (["Style injection.gamma"], "not of the form"),
        (["Style injection.gama=1"], "has no input 'gama' to set; it has gamma"),
        (["Contnt.x=1"], "no node has the title 'Contnt'"),
        (["Style injection.model=1"], "has no input 'model'"),
        (["Schedule.steps=4.5"], "'4.5' is no whole number; it is 20 now"),
        (["Schedule.steps=true"], "is no whole number"),
        (["Style injection.gamma=much"], "is no number"),
        (["Sample.add_noise=1"], "is no true or false"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        make_recipe("styleid_mini", settings)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("nowhere", {}, "cannot be read"),
        ("style_reference_flux", {}, "no node is called 'Content' or .*--content-title.*'Style'"),
        ("styleid_mini", {"style": "Sample"}, "'Sample' is a SamplerCustom, not a picture"),
        ("styleid_mini", {"content": "Style"}, "are both 'Style'"),
        ("styleid_mini", {"result": "Nothing"}, "0 nodes have this title"),
        ("styleid_mini", {"result": "Invert content"}, "'Invert content' does not depend on the picture 'Style'"),
        ("fastsam_localized_style_mini", {}, "which node saves the result.*'StyleID on the object'"),
    ],
)
def test_workflows_that_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        make_recipe(name, **options)


def test_a_workflow_of_the_front_end_is_told_from_an_api_file(tmp_path):
    (tmp_path / "w.json").write_text('{"nodes": [], "links": []}')
    with pytest.raises(UserError, match="Export \\(API\\)"):
        make_recipe(tmp_path / "w.json")


# ---- time left ----


def test_time_left_follows_the_last_pictures(capsys):
    now = [0.0]
    line = ProgressLine(100, 10, clock=lambda: now[0])
    for _ in range(5):
        now[0] += 2
        line.done("x.png")
    assert line.words() == "15/100, 2 min 50 s left"
    for _ in range(85):
        now[0] += 1
        line.done("x.png")
    assert line.words() == "100/100"
    assert [duration(s) for s in (0, 59.6, 3599.6, 7260)] == ["0 s", "1 min 00 s", "1 h 00 min", "2 h 01 min"]


def test_the_line_on_a_terminal_redraws_itself(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    now = [0.0]
    line = ProgressLine(4, clock=lambda: now[0])
    now[0] = 90
    line.done("a picture's name is not shown")
    line.draw(servers=2)
    line.tell("a server was lost")
    line.draw(servers=1)
    line.close()
    said = capsys.readouterr().out
    assert "\r[######..................]  25%  1/4, 4 min 30 s left, 2 servers " in said and "1 server " in said and "name" not in said
    assert " \ra server was lost\n" in said and said.endswith("\n")
