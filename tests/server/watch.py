"""Asks a server for /health and /metrics all the time, from a process of its own, so that what it measures is not its own test's work."""

import http.client
import json
import subprocess
import sys
import threading
import time


def main(host, port):
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    seconds, failures = [], []
    while not over.is_set() and not failures:
        for path in ("/health", "/metrics"):
            begin = time.monotonic()
            try:
                connection = http.client.HTTPConnection(host, int(port), timeout=30)
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                connection.close()
                if response.status != 200:
                    failures.append(f"{path}: {response.status}")
            except OSError as error:
                failures.append(f"{path}: {error!r}")
            seconds.append(time.monotonic() - begin)
        time.sleep(0.005)
    print(json.dumps({"seconds": seconds, "failures": failures}))


class Watch:
    """From its making to end()."""

    def __init__(self, server):
        host, port = server.address
        self._process = subprocess.Popen([sys.executable, __file__, host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self):
        """Ends it, and holds the server to 0.1 s. A shared machine may stop a process for a moment, the client's too: one in a hundred is let off."""
        out, _ = self._process.communicate("", timeout=60)
        result = json.loads(out)
        assert result["failures"] == []
        s = sorted(result["seconds"])
        at = lambda part: s[int(part * (len(s) - 1))]
        print(f"/health and /metrics, {len(s)} times: median {1e3 * at(0.5):.1f} ms, 99 % {1e3 * at(0.99):.1f} ms, most {1e3 * s[-1]:.1f} ms")
        assert len(s) > 20
        assert at(0.99) < 0.1
        assert s[-1] < 1


if __name__ == "__main__":
    main(*sys.argv[1:])
