"""The application of the page on FastAPI, as a reader pastes it, under the command that a reader types."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_pages import examples
from tests.support import needs
from tests.support.kits import LIMIT
from tests.support.web import fetch, fetch_together

pytestmark = pytest.mark.programs

needs.module("fastapi", extra="fastapi")
needs.module("uvicorn", extra="demo")
needs.module("aiosqlite", extra="aiosqlite")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "fastapi.md"
CODE = [example.code for example in examples(PAGE.read_text(encoding="utf-8"))]


def test_the_application_of_the_page_runs_under_uvicorn(tmp_path):
    """`uvicorn shop:app` serves sync and async endpoints, background tasks, events and a websocket; it ends well."""
    client: Any = needs.module("websockets.sync.client", extra="fastapi")
    later = next(code for code in CODE if "websocket(" in code)
    shop = CODE[0] + "\n" + later[: later.index("\nask(")]
    (tmp_path / "shop.py").write_text(shop, encoding="utf-8")
    options = ["--port", "0", "--lifespan", "on", "--ws", "websockets-sansio"]
    with subprocess.Popen(
        [sys.executable, "-m", "uvicorn", *options, "shop:app"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://127.*?:(\d+)", line)))
            assert fetch(port, "/orders?item=tea", method="POST") == (201, b"1")
            assert {answer for answer, _ in fetch_together(port, ["/buy"] * 1).values()} == {200}
            with client.connect(f"ws://127.0.0.1:{port}/orders") as socket:
                socket.send("coffee")
                assert socket.recv(LIMIT) == "saved"
            assert fetch(port, "/events") == (200, b"data: tea\n\ndata: milk\n\ndata: coffee\n\n")
            assert json.loads(fetch(port, "/orders/1")[1]) == "tea, says GET /orders/{id}"
            assert fetch(port, "/report") == (200, b"3")
        finally:
            server.terminate()
        rest = server.stdout.read()
    assert "receipt for milk" in rest
    assert "Application shutdown complete" in rest
    assert "Traceback" not in rest
