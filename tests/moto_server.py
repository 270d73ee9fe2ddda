"""A real object store of this machine, in a process that can be killed and started again with what it held.

Moto keeps everything in memory. It records the requests that it was sent in a file, and a server that is started again
is sent them once more before anyone else is told of it: so a kill loses what was on the way, and nothing that was
answered.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

BUCKET = "studies"


class MotoServer:
    """The server.

    Args:
        folder: Where requests are recorded.
    """

    def __init__(self, folder):
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process = None
        self._is_new = True

    def start(self):
        """Start it, with everything that it held before."""
        record = self._folder / "requests"
        env = {**os.environ, "MOTO_RECORDER_FILEPATH": str(record), "MOTO_ENABLE_RECORDING": "True"}
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not self._answers():
            if time.monotonic() > until:
                raise TimeoutError("the server does not start")
            time.sleep(0.1)
        if not self._is_new:
            self._post("/moto-api/recorder/replay-recording")
        else:
            self._is_new = False
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=30)

    def kill(self):
        """Kill it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _answers(self):
        try:
            urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def _post(self, path):
        urllib.request.urlopen(urllib.request.Request(self.url + path, method="POST"), timeout=60)


def _free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
