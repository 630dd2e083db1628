"""A server of a test's own, which answers while in its `with`."""

import threading


class Listening:
    """Of a class that has its server in `http`."""

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
