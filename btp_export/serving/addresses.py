"""The picture at the address that a request names: data: URIs, and what else the server allows.

An address of the web is looked up once, refused unless all it leads to is public (or private ones are allowed), and the
connection goes to exactly what was checked: a name that leads elsewhere a moment later changes nothing. Redirects are
followed by the same rules. All of it has one deadline and one limit on bytes.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

from btp_export.serving.limits import Access, Limits
from btp_export.serving.refusals import Refusal

REDIRECTS = 3
PIECE = 2**16  # bytes
DATA = re.compile(r"data:(?P<type>[\w.+/-]*)(?P<parameters>(?:;[^;,]*)*?)(?P<base64>;base64)?,", re.IGNORECASE)


def picture_bytes(address: str, access: Access, limits: Limits) -> bytes:
    """The picture's file. Raises Refusal for what is not allowed, is not there, is too large or takes too long."""
    scheme = address.partition(":")[0].lower()
    if scheme == "data":
        return _of_data(address, limits)
    if scheme in ("http", "https"):
        if not access.http:
            raise _refused("an address of the web; wanted: a data: URI (serve --allow-http allows such addresses)")
        return _fetched(address, access, limits)
    if scheme == "file":
        if access.files is None:
            raise _refused("a file; wanted: a data: URI (serve --files allows those of a folder)")
        return _of_file(address, access.files, limits)
    raise _refused("an address of an unknown kind; wanted: data:image/png;base64,... or another picture type")


def _of_data(address: str, limits: Limits) -> bytes:
    header = DATA.match(address[:1000])
    if header is None:
        raise _refused("a data: URI that is none; wanted: data:image/png;base64,...")
    text = address[header.end() :]
    if len(text) > limits.picture * (4 / 3 if header["base64"] else 3) + 4:
        raise _too_large(limits)
    try:
        data = base64.b64decode(text, validate=True) if header["base64"] else unquote_to_bytes(text)
    except (binascii.Error, ValueError) as error:
        raise _refused(
            "a data: URI that is not base64; wanted: the standard alphabet, no line breaks and no other signs"
        ) from error
    if len(data) > limits.picture:
        raise _too_large(limits)
    return data


def _of_file(address: str, folder: Path, limits: Limits) -> bytes:
    """A regular file below `folder`, links resolved. Whether something is there is not said of other places."""
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
        raise _refused("a file of another machine")
    try:
        path = Path(unquote(parts.path)).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise _refused("a file outside the folder that this server reads")
        # A pipe would wait for a writer, for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _refused("not a file")
            data = file.read(limits.picture + 1)
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused("no such file") from error
    if len(data) > limits.picture:
        raise _too_large(limits)
    return data


def _fetched(address: str, access: Access, limits: Limits) -> bytes:
    deadline = time.monotonic() + limits.fetch_seconds
    for _ in range(REDIRECTS + 1):
        try:
            answer = _get(address, access, limits, deadline)
        except (OSError, http.client.HTTPException, ValueError, UnicodeError) as error:
            if isinstance(error, TimeoutError):
                raise _refused(f"the address did not answer within {limits.fetch_seconds:g} s") from error
            raise _refused("the address cannot be read") from error
        if isinstance(answer, bytes):
            return answer
        address = urljoin(address, answer)
        if not address.lower().startswith(("http://", "https://")):
            raise _refused("the address leads to something that is not of the web")
    raise _refused(f"the address leads on more than {REDIRECTS} times")


def _get(address: str, access: Access, limits: Limits, deadline: float) -> bytes | str:
    """What is there, or where it leads."""
    parts = urlsplit(address)
    if not parts.hostname:
        raise _refused("an address without a host")
    secure = parts.scheme.lower() == "https"
    port = parts.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = connected = _connected(parts.hostname, port, access, deadline, secure=secure)
    # A timeout of the socket would begin again with each byte that comes.
    alarm = threading.Timer(_left(deadline), _shut, [connected])
    alarm.daemon = True
    alarm.start()
    try:
        where = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", where, headers={"accept": "image/*", "user-agent": "btp-export"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            target = response.getheader("location")
            if target is None:
                raise _refused("the address leads nowhere")
            return target
        if response.status != 200:
            raise _refused(f"the address answers with status {response.status}")
        return _body(response, limits)
    finally:
        alarm.cancel()
        connection.close()
        _left(deadline)


def _connected(host: str, port: int, access: Access, deadline: float, *, secure: bool) -> socket.socket:
    """A connection to the first address of the host, all of which are allowed. Raises Refusal if one is not."""
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not access.private and not all(_is_public(str(address)) for address in addresses):
        raise _refused("an address of a private network (serve --allow-private allows those)")
    plain = socket.create_connection((str(addresses[0]), port), timeout=_left(deadline))
    if not secure:
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _is_public(address: str) -> bool:
    """Whether it is an address of the internet, also one of version 4 that is written as version 6."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    return parsed.is_global and not parsed.is_multicast and (mapped is None or mapped.is_global)


def _body(response: http.client.HTTPResponse, limits: Limits) -> bytes:
    if int(response.getheader("content-length") or 0) > limits.picture:
        raise _too_large(limits)
    data = bytearray()
    while True:
        piece = response.read1(PIECE)
        data += piece
        if len(data) > limits.picture:
            raise _too_large(limits)
        if not piece:
            return bytes(data)


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _refused(message: str) -> Refusal:
    return Refusal(f"image_url: {message}", param="image_url")


def _too_large(limits: Limits) -> Refusal:
    return _refused(f"more than {limits.picture} bytes")
