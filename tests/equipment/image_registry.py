"""A registry of images on loopback with one small image, as engines pull from it (OCI distribution, read side)."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


class ImageRegistry:
    """See the module; any name but those told of below is the image."""

    def __init__(self, program: Path) -> None:
        self.host = ""
        """`127.0.0.1:port`; the part of an image's name before the first slash."""
        self.manifests: Counter[str] = Counter()
        """How often each name's manifest was asked for, HEAD and GET together."""
        self.answering = asyncio.Event()
        """Clear it to hold back the layers: a pull that takes its time."""
        self.answering.set()
        self.broken = False
        """Whether every question is answered with 500."""
        self._blobs: dict[str, bytes] = {}
        self._manifest = self._make(program)

    def _make(self, program: Path) -> bytes:
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            entry = tarfile.TarInfo("bin/busybox")
            entry.mode, entry.size = 0o755, program.stat().st_size
            with program.open("rb") as source:
                archive.addfile(entry, source)
        layer = gzip.compress(tar.getvalue(), 1, mtime=0)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/busybox", "sleep", "1000000"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(tar.getvalue())]},
            "history": [{"created_by": "a test"}],
        }
        told = json.dumps(config).encode()
        self._blobs = {_digest(blob): blob for blob in (layer, told)}
        document = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": _CONFIG, "size": len(told), "digest": _digest(told)},
            "layers": [{"mediaType": _LAYER, "size": len(layer), "digest": _digest(layer)}],
        }
        return json.dumps(document).encode()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.broken:
            return web.Response(status=500, text="out of order")
        name, _, rest = request.path.removeprefix("/v2/").partition("/manifests/")
        if rest:
            self.manifests[name] += 1
            if name == "missing":
                return _refusal(404, "MANIFEST_UNKNOWN", "manifest unknown")
            if name == "secret":
                return _refusal(403, "DENIED", "requested access to the resource is denied")
            headers = {"Docker-Content-Digest": _digest(self._manifest), "Content-Type": _MANIFEST}
            return web.Response(body=self._manifest, headers=headers)
        if "/blobs/" in request.path:
            await self.answering.wait()
            blob = self._blobs[request.path.rpartition("/")[2]]
            return web.Response(body=blob, content_type="application/octet-stream")
        return web.json_response({}, headers={"Docker-Distribution-Api-Version": "registry/2.0"})


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _refusal(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"errors": [{"code": code, "message": message}]}, status=status)


@asynccontextmanager
async def image_registry(program: Path) -> AsyncIterator[ImageRegistry]:
    """Serve it while this lasts."""
    registry = ImageRegistry(program)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", registry.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        registry.host = f"{host}:{port}"
        yield registry
    finally:
        await runner.cleanup()
