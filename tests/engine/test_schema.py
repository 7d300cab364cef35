"""The whole server from its own /openapi.json, by schemathesis: no 5xx, no hang, nothing kept."""

import gc

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Running, wait

from fullarc.engine.request import Request

schemathesis = pytest.importorskip("schemathesis", reason="it comes with make setup")
pytestmark = pytest.mark.slow
SECONDS, EXAMPLES = 30.0, 20


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    running.engine.scheduler.max_queue = 64
    yield running
    running.stop()


def wake(server):
    """What a request before may have left: a pause, slowness, bounds, an open update, names that are taken."""
    worker = server.server.service.worker

    def act(s):
        s.paused, s.max_queue, s.max_running, worker.sleep_s = False, 64, 4, 0.0
        s.abort(None)

    worker.call(act).result(30)


def test_no_request_by_the_schema_fails(server, tmp_path, monkeypatch):
    """Every operation, with values that fit its schema and values that do not. Folders that they name are made."""
    monkeypatch.chdir(tmp_path)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 80
    for operation in operations:
        modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=st.one_of(modes))
        def check(case):
            wake(server)
            answer = case.call(timeout=SECONDS)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        check()
        assert server.server.service.worker.healthy, operation.label


def test_nothing_is_kept(server):
    """Runs behind the others."""
    wake(server)
    s = server.engine.scheduler
    wait(lambda: not s.running and not s.waiting)
    assert len(s.free) == 4 and server.server.service.worker.healthy and not server.server.service._noted
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Request]


def test_every_body_that_is_read_is_described(server):
    """A route says that what it got is no JSON if, and only if, its body is in the description."""
    paths = httpx.get(server.url + "/openapi.json", trust_env=False).json()["paths"]
    for path, methods in paths.items():
        for method, entry in methods.items():
            if method != "get":
                wake(server)
                answer = httpx.request(
                    method, server.url + path, content=b"{", timeout=SECONDS, trust_env=False
                )
                assert ("Invalid JSON" in answer.text) is ("requestBody" in entry), (path, answer.text)
    wake(server)
