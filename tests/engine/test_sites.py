"""Without a key, pages of other sites cannot steer a server of this machine, whatever name they reach it by."""

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from running import Running

EVIL = {"origin": "http://evil.example", "content-type": "text/plain"}


@pytest.mark.parametrize(
    "headers, says",
    [
        (EVIL, "http://evil.example"),
        ({"origin": "null"}, "null"),
        ({"origin": "http://localhost.evil.example"}, "other sites"),
        ({"origin": "chrome-extension://abcdefgh"}, "other sites"),
        ({"origin": "http://[evil"}, "other sites"),
        ({"sec-fetch-site": "cross-site"}, "other sites"),
        ({"host": "evil.example"}, "not 'evil.example'"),
        ({"host": "evil.example", "origin": "http://evil.example"}, "not 'evil.example'"),
        ({"host": "10.0.0.7:30000"}, "not '10.0.0.7:30000'"),
        ({"host": "127.0.0.1.evil.example"}, "loopback's names"),
    ],
)
def test_pages_of_other_sites_and_other_names_are_refused(http, server, headers, says):
    answer = http.post("/slow_down", content=b'{"forward_sleep_time": 1}', headers=headers)
    assert answer.status_code == 403 and says in answer.json()["error"]["message"]
    assert server.server.service.worker.sleep_s == 0
    assert http.post("/v1/messages", json={}, headers=headers).json()["error"]["type"] == "permission_error"
    assert http.get("/release_memory_occupation", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost"},
        {"host": "[::1]:30000", "origin": "http://[::1]:30000", "sec-fetch-site": "same-origin"},
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-site"},
        {"host": "127.0.0.2:1", "origin": "https://localhost"},
    ],
)
def test_pages_and_clients_of_this_machine_are_answered(http, headers):
    assert http.post("/slow_down", content=b"{}", headers=headers).status_code == 200
    assert http.get("/", headers=headers | {"sec-fetch-site": "cross-site"}).status_code == 200, "a link"


def test_whoever_has_the_key_may_come_from_anywhere(checkpoints):
    running = Running(checkpoints["v0"], api_key="k")
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False, headers={"x-api-key": "k"}) as http:
        headers = EVIL | {"host": "public.example", "sec-fetch-site": "cross-site"}
        assert http.post("/slow_down", content=b"{}", headers=headers).status_code == 200
    running.stop()


PAGE = """<script>
const url = new URLSearchParams(location.search).get("url"), image = new Image();
fetch(url + "/slow_down", {method: "POST", mode: "no-cors", body: '{"forward_sleep_time": 1}'});
image.src = url + "/release_memory_occupation";
</script>"""


class Site(BaseHTTPRequestHandler):
    """Somebody's page, which sends to the engine what a page can without asking."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_browser_on_a_page_of_another_site_steers_nothing(server, tmp_path):
    """evil.example is the site's, and then (rebinding) the engine's."""
    chromium, app, seen = shutil.which("chromium") or pytest.skip("no chromium"), server.server.app, []

    async def noting(scope, receive, send):
        seen.append((dict(scope["headers"])[b"host"].decode(), scope["path"]))
        await app(scope, receive, send)

    server.uvicorn.config.loaded_app = noting
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    own = server.url.removeprefix("http://")
    rules = "MAP evil.example 127.0.0.1"
    hosts = own, own.replace("127.0.0.1", "evil.example")
    for host in hosts:
        page = f"http://evil.example:{site.server_port}/?url=http://{host}"
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", f"--host-resolver-rules={rules}", f"--user-data-dir={tmp_path}",
             "--virtual-time-budget=3000", "--dump-dom", page],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    site.shutdown()
    assert {*seen} >= {
        (host, path) for host in hosts for path in ("/slow_down", "/release_memory_occupation")
    }
    assert not server.server.service.worker.sleep_s and not server.engine.scheduler.paused
