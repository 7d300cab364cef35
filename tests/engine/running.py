"""A server in a thread of the test's own process."""

import socket
import threading
import time

import uvicorn

from fullarc.engine import Engine
from fullarc.engine.server import Server


class Running:
    """A server in a thread of this process."""

    def __init__(self, folder, api_key=None, max_len=256, max_batch=4, draft_steps=0, overlap=False):
        self.engine = Engine(
            folder, max_batch=max_batch, max_len=max_len, draft_steps=draft_steps, overlap=overlap
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = Server(self.engine, str(folder), api_key)
        app = self.server.app
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        wait(lambda: self.uvicorn.started)

    def slow_down(self, seconds=0.003):
        """From now on every step takes at least so long, that something can happen between two of them."""
        scheduler = self.engine.scheduler
        step = scheduler.step

        def slowly():
            time.sleep(seconds)
            step()

        scheduler.step = slowly

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(10)


def wait(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
