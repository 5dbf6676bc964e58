"""Google Cloud Storage on this machine: gcp-storage-emulator, taught the preconditions that locks and TensorStore rely on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

from gcp_storage_emulator import server, storage
from gcp_storage_emulator.exceptions import NotFound

BUCKET = "bucket"
_one_at_a_time = threading.Lock()


def _guarded(handler: Callable[..., None]) -> Callable[..., None]:
    """A handler that keeps to the preconditions of a request: which generation an object has (0: it is not there) or has not.

    And tells the generation of what is read.
    """

    def handle(request: Any, response: Any, objects: Any) -> None:
        query, body = request.query, request.data
        with _one_at_a_time:
            name = request.params.get("object_id") or query.get("name", [None])[0]
            if name is None and isinstance(body, dict) and "meta" in body:
                name = body["meta"]["name"]
            found = "0"
            with suppress(NotFound):
                found = str(objects.get_file_obj(request.params.get("bucket_name"), name)["generation"])
            if query.get("ifGenerationMatch", [found]) != [found]:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif query.get("ifGenerationNotMatch") == [found]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                response["x-goog-generation"] = found
                handler(request, response, objects)

    return handle


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is said of clients that went away."""


@contextmanager
def emulator() -> Iterator[tuple[dict[str, str], Any]]:
    """An empty bucket called BUCKET; the environment in which gs:// leads there, and the emulator's storage."""
    for name in ("gcp_storage_emulator", "api.object"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers, http, normal = server.HANDLERS, server.server.HTTPServer, storage._FileStore._norm
    server.HANDLERS = tuple((route, {m: _guarded(h) for m, h in found.items()}) for route, found in handlers)
    server.server.HTTPServer = _Server
    storage._FileStore._norm = staticmethod(lambda path: path.strip("/"))  # GCS knows no folders: ".." is a name as any
    started = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    try:
        started.start()
        port = started._api._httpd.server_address[1]
        url = f"http://127.0.0.1:{port}"
        # gcsfs and Google's client, TensorStore; and none of the newer protocols that the emulator does not speak.
        yield (
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            },
            started._storage,
        )
    finally:
        started.stop()
        server.HANDLERS, server.server.HTTPServer, storage._FileStore._norm = handlers, http, normal
