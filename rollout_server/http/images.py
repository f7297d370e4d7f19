"""Images in a request: how many, of which kinds and how large, told from their first bytes.

A few bytes of a compressed image can become gigabytes once they are decoded. An image's header says
how large it is, so what would be too much is refused before vLLM decodes anything.
"""

import base64
import binascii
import io

from rollout_server.engine.images import IMAGES
from rollout_server.http.responses import BadRequest, shown

PIXELS = 1 << 25  # of an image; 3 bytes each when it is decoded
ALL_PIXELS = 1 << 27  # of all images of a request
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # others' readers are many, and rarely used


class Images:
    """Those of one request, as they are found."""

    def __init__(self) -> None:
        self._count = 0
        self._pixels = 0

    def add_url(self, name: str, url: str) -> None:
        """`BadRequest` unless `url` is a data: URL of an image that there is room for."""
        described, comma, data = url.strip()[len("data:") :].partition(",")
        if not comma or described.rpartition(";")[2].strip().lower() != "base64":
            raise BadRequest(f"{name} is {shown(url)}; give data:image/png;base64,...")
        self.add(name, data)

    def add(self, name: str, data: str) -> None:
        """The same for base64 data."""
        self._count += 1
        if self._count > IMAGES:
            raise BadRequest(f"{name}: the request has more than {IMAGES} images; send fewer")
        width, height = _size(name, data)
        pixels = width * height
        if pixels > PIXELS:
            raise BadRequest(
                f"{name} has {width} x {height} pixels; give at most {PIXELS} in an image"
            )
        self._pixels += pixels
        if self._pixels > ALL_PIXELS:
            raise BadRequest(
                f"{name}: all images up to this one have {self._pixels} pixels; give at most "
                f"{ALL_PIXELS} in a request"
            )


def _size(name: str, data: str) -> tuple[int, int]:
    """(width, height) in pixels."""
    from PIL import Image

    try:
        read = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{name}: its data aren't base64: {error}") from None
    try:
        with Image.open(io.BytesIO(read), formats=KINDS) as image:
            size: tuple[int, int] = image.size
    except Image.DecompressionBombError as error:
        raise BadRequest(f"{name}: {error}; give at most {PIXELS} pixels in an image") from None
    except Exception:  # whatever a reader stumbles over, its own limits included
        kinds = ", ".join(KINDS)
        raise BadRequest(f"{name} isn't an image that can be read; give one of {kinds}") from None
    return size
