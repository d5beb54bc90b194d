"""The page: what it says of runs, its server, and how it looks in a headless Chromium."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from megatron.analysis.dashboard.content import as_text, sections
from megatron.analysis.dashboard.pictures import load_over_time_picture, loss_picture
from megatron.analysis.dashboard.run import Run
from megatron.analysis.dashboard.serve import Dashboard, DashboardError, build_app, open_runs, serve, write_repeatedly
from megatron.analysis.page import DataTable, Notice, Section
from megatron.monitor.alerts.alert import Alert
from megatron.monitor.jsonl import JsonlSink
from tests.browser import CHROMIUM, Browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
LAYERS, EXPERTS, LORES = 3, 4, 2


def routing(step: int) -> dict[str, Any]:
    load = [[100 + step + 10 * i * j for j in range(EXPERTS)] for i in range(LAYERS)]
    by_layer = [1.0 + 0.1 * i + 0.01 * step for i in range(LAYERS)]
    names = ("load_imbalance", "delta_uniform", "router_entropy", "expert_replacement", "process_overload")
    numbers = {f"moe/{name}": by_layer[1] for name in names} | {f"moe/{name}_by_layer": by_layer for name in names}
    return {**numbers, "moe/expert_load": load, "moe/lore_load": [[50] * EXPERTS * LORES] * LAYERS, "moe/dead_experts": 0, "moe/dead_lores": step % 3}


def write_run(folder: Path, steps: range, *, alert_at: int | None = None) -> None:
    sink = JsonlSink(folder / "metrics.jsonl", resume_from=steps[0] - 1)
    for step in steps:
        values = {"train/lm_loss": 5 - 0.01 * step, "train/learning_rate": 1e-3, "train/grad_norm": 1.0}
        sink.write(step, {**values, **({"runtime/tokens_per_sec": 1e4, **routing(step)} if step % 5 == 0 else {})})
        if step == alert_at:
            sink.alert(Alert(kind="dead_experts", step=step, layer=2, value=0.0, limit=0.01, seen="Expert <3> got nothing."))
    sink.write(steps[-1], {"validation/lm_loss": 4.5})
    sink.close()


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    write_run(tmp_path / "one", range(1, 61), alert_at=40)
    write_run(tmp_path / "two", range(1, 41))
    (tmp_path / "empty").mkdir()
    found = open_runs([str(tmp_path / name) for name in ("one", "two", "empty")])
    for run in found:
        run.refresh()
    return found


def test_the_table_and_the_notices(runs: list[Run]) -> None:
    now, training, routing, loads, layers = sections(runs)
    assert [section.title for section in (now, training, routing, loads, layers)] == [
        "Now",
        "Training",
        "Routing",
        "Load of the experts",
        "Layer by layer",
    ]
    table, *notices, alerts = now.parts
    assert isinstance(table, DataTable)
    assert [row[0] for row in table.rows] == ["one", "two", "empty"]
    named = dict(zip(table.columns, table.rows[0], strict=True))
    assert (named["step"], named["loss"], named["validation"], named["tokens/s"], named["dead LoREs"]) == ("60", "4.4000", "4.5000", "10,000", "0")
    assert [notice.text for notice in notices if isinstance(notice, Notice)] == [
        f"empty: nothing yet. The page waits for {runs[2].file.path}.",
        "1 alert.",
    ]
    assert isinstance(alerts, DataTable)
    assert alerts.rows[0][:3] == ["40", "one", "dead experts, layer 2"]
    assert alerts.rows[0][3].startswith("Expert <3> got nothing.\nRaise the coefficient of load_balance")


def test_a_run_without_experts_has_no_routing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "train/lm_loss": 2.0}\n')
    (run,) = open_runs([str(tmp_path / "metrics.jsonl")])
    run.refresh()
    assert [section.title for section in sections([run])] == ["Now", "Training"]
    assert Section("Now", sections([run])[0].parts).parts[-1] == Notice("No alerts.", level="good")


def test_a_loss_that_was_never_finite_is_drawn(tmp_path: Path) -> None:
    text = "".join(json.dumps({"iteration": step, "train/lm_loss": None}) + "\n" for step in range(500))
    alert = {"kind": "nan_streak", "step": 3, "seen": "The loss is nan.", "try": "x", "layer": None}
    (tmp_path / "metrics.jsonl").write_text(text + json.dumps({"iteration": 499, "alert": alert}) + "\n")
    (run,) = open_runs([str(tmp_path)])
    run.refresh()
    figure = loss_picture([run])
    assert figure is not None
    assert figure["data"][-1]["text"] == [f"{run.name}, step 3: nan streak: The loss is nan."]
    assert as_text(run.last("train/lm_loss"), ".3f") == "NaN"


def test_many_experts_over_time_become_the_idlest_and_the_busiest_of_each_layer(tmp_path: Path) -> None:
    records = [{"iteration": step, "moe/expert_load": [[1] * 63 + [3], [2] * 63 + [0], [1] * 64]} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run,) = open_runs([str(tmp_path)])
    run.refresh()
    figure = load_over_time_picture(run)
    assert figure is not None
    (data,) = figure["data"]
    assert data["y"] == [f"layer {layer}, {name}" for layer in range(3) for name in ("idlest", "busiest")]
    assert (2 ** data["z"][:, 0]).round(3).tolist() == pytest.approx([64 / 66, 3 * 64 / 66, 2.0**-10, 64 / 63, 1, 1], abs=1e-3)


def test_wrong_folders_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DashboardError, match=r"nowhere: there is no such folder\. Give the folder that a run saves to \(the key `save`\)"):
        open_runs([str(tmp_path / "nowhere")])
    (tmp_path / "training.png").write_bytes(b"x")
    with pytest.raises(DashboardError, match=r"training.png: this is no metrics file \(its name would end in .jsonl\)\. Give the folder"):
        open_runs([str(tmp_path / "training.png")])
    with pytest.raises(DashboardError, match=r"A run is given twice\."):
        open_runs([str(tmp_path), f"{tmp_path}/."])


def test_the_file_is_written_again_until_it_is_told_to_stop(tmp_path: Path) -> None:
    write_run(tmp_path / "run", range(1, 11))
    dashboard, page = Dashboard(open_runs([str(tmp_path / "run")]), every=7), tmp_path / "page.html"
    waited: list[float] = []

    def stop(seconds: float) -> None:
        waited.append(seconds)
        assert f"<td>{10 * len(waited)}</td>" in page.read_text()
        write_run(tmp_path / "run", range(10 * len(waited) + 1, 10 * len(waited) + 11))
        if len(waited) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_repeatedly(dashboard, page, once=False, stop=stop)
    assert waited == [7, 7, 7]
    assert 'data-refresh="7"' in page.read_text()
    write_repeatedly(dashboard, page, once=True)
    assert "<td>40</td>" in page.read_text()
    assert "data-refresh" not in page.read_text()


def test_a_folder_in_place_of_a_page_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DashboardError, match=r"this is a folder\. Give the name of a file in it, such as .*page\.html"):
        write_repeatedly(Dashboard(open_runs([str(tmp_path)]), every=1), tmp_path, once=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server with two runs, and the folder of the runs."""
    write_run(tmp_path / "one", range(1, 61), alert_at=40)
    write_run(tmp_path / "two", range(1, 41))
    app = build_app(Dashboard(open_runs([str(tmp_path / name) for name in ("one", "two")]), every=1))
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not running.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", tmp_path
    running.should_exit = True
    thread.join(30)


def test_the_server_sends_parts_only_if_there_is_something_new(server: tuple[str, Path]) -> None:
    url, folder = server
    first = httpx.get(f"{url}/?parts", timeout=60)
    assert "<td>60</td>" in first.text
    assert "plotly.js" not in first.text
    with (folder / "one/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 61, "train/lm_loss": 3.0}\n')
    second = httpx.get(f"{url}/?parts&have={first.headers['etag']}", timeout=60)
    assert "<td>61</td>" in second.text
    for _ in range(3):  # its version also changes twice a minute
        same = httpx.get(f"{url}/?parts&have={second.headers['etag']}", timeout=60)
        if same.status_code == 204:
            break
        second = same
    assert (same.status_code, same.text) == (204, "")


def test_the_server_answers_to_its_own_names_alone(server: tuple[str, Path]) -> None:
    assert httpx.get(f"{server[0]}/?parts", headers={"host": "rebound.example"}).status_code == 400
    assert httpx.get(f"{server[0]}/anything").status_code == 404


def test_a_taken_port_is_a_sentence(server: tuple[str, Path]) -> None:
    port = int(server[0].rsplit(":", 1)[1])
    with pytest.raises(DashboardError, match=rf"cannot be served on port {port}: Address already in use. Give another one with --port, or 0"):
        serve(Dashboard([], every=1), port=port)


DRAWN = "document.documentElement.dataset.drawn === 'yes'"
INK = """[...document.querySelectorAll('main .plot')].filter((plot) => plot.offsetParent !== null)
    .map((plot) => plot.querySelectorAll('.scatterlayer path.js-line, .heatmaplayer image, .scatterlayer path.point').length)"""


@needs_chromium
def test_the_page_is_drawn_and_takes_new_numbers_in_place(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    browser = Browser(tmp_path / "profile")
    try:
        browser.show(1300)
        browser.open(f"{url}/")
        browser.wait(DRAWN)
        drawn = browser.evaluate(INK)
        assert len(drawn) >= 12
        assert all(drawn), "every picture has lines, points or cells"
        assert "dead experts, layer 2" in browser.evaluate("document.querySelector('main').innerText")
        browser.evaluate("window.mark = 1; Plotly.relayout(document.querySelector('.plot > div'), {'xaxis.range': [5, 20]}); 0")
        write_run(folder / "two", range(41, 71), alert_at=70)
        browser.wait("document.querySelector('tbody tr:nth-child(2) td:nth-child(2)').textContent === '70'")
        assert browser.evaluate("[window.mark, document.querySelector('.plot > div').layout.xaxis.range]") == [1, [5, 20]], "it was not loaded anew"
        assert "2 alerts." in browser.evaluate("document.querySelector('main').innerText")
        browser.screenshot(tmp_path / "page.png")
        assert browser.errors == []
        assert [request for request in browser.left() if not request.startswith(f"{url}/")] == []
    finally:
        browser.close()


@needs_chromium
def test_the_file_needs_nothing_else(runs: list[Run], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_repeatedly(Dashboard(runs, every=5), page, once=True)
    browser = Browser(tmp_path / "profile")
    try:
        browser.show(700, dark=True)
        browser.open(page.as_uri())
        browser.wait(DRAWN)
        assert all(browser.evaluate(INK))
        assert browser.evaluate("document.documentElement.scrollWidth <= 700"), "nothing sticks out of a narrow window"
        assert (browser.errors, browser.left()) == ([], [])
    finally:
        browser.close()
