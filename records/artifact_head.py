"""What the head of a packed model of ours says, read without torch and without running anything.

The layout is train_gpt.py's (section 11): a prefix with a checksum over the whole file, then a compressed
body that begins with the length of a JSON header. Only the header is unpacked.
"""

import hashlib
import io
import json
import struct
import zlib

MAGIC = b"PGOLFQ"
PREFIX = struct.Struct("<6sB4s8sQQ")  # magic, version, codec, sha256[:8] of all else, raw and packed length
VERSION = 1
RANS_HEAD = struct.Struct("<BBII")  # of the body of CODEC=rans: see records/README.md
HEADER_LIMIT = 1 << 22  # bytes; a tensor takes about 100 of it
WINDOW_LIMIT = 1 << 27  # bytes of memory that a compressed body may ask for


class BadArtifact(Exception):
    """Why a file that begins like a packed model of ours is none, in one line."""


class NoCodec(Exception):
    """The library that a packed model was compressed with is not installed here."""


def is_ours(blob: bytes) -> bool:
    """Whether the file begins as train_gpt.py's packed models do."""
    return blob.startswith(MAGIC)


def read_head(blob: bytes) -> dict:
    """The JSON header of a packed model of ours.

    Raises BadArtifact if a byte of the file was changed, NoCodec if it cannot be read here.
    """
    if len(blob) < PREFIX.size:
        raise BadArtifact("it is cut off in its prefix")
    magic, version, codec, checksum, raw_length, packed_length = PREFIX.unpack_from(blob)
    body = blob[PREFIX.size :]
    if magic != MAGIC or version != VERSION:
        raise BadArtifact(f"its format version is {version}, not {VERSION}")
    unchecked = PREFIX.pack(magic, version, codec, bytes(8), raw_length, packed_length)
    if len(body) != packed_length or hashlib.sha256(unchecked + body).digest()[:8] != checksum:
        raise BadArtifact("its checksum is wrong: a byte was changed or is missing")
    try:
        start = decompress_start(codec, body)
        length = struct.unpack_from("<I", start)[0]
        header = json.loads(start[4 : 4 + length])
    except (BadArtifact, NoCodec):
        raise
    except Exception as error:  # a forged body: whatever breaks, the file is to blame
        raise BadArtifact(f"its header cannot be read ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise BadArtifact("its header is no object")
    return header


def decompress_start(codec: bytes, body: bytes) -> bytes:
    """The first bytes of an unpacked body, at most HEADER_LIMIT of them."""
    if codec == b"zlib":
        return zlib.decompressobj().decompress(body, HEADER_LIMIT)
    if codec == b"rans":  # its text begins as the bodies of the others do, and zlib packs it
        return zlib.decompressobj().decompress(body[RANS_HEAD.size :], HEADER_LIMIT)
    if codec == b"brot":
        return decompress_brotli_start(body)
    if codec != b"zstd":
        raise BadArtifact(f"its codec is {codec!r}")
    try:
        import zstandard
    except ImportError:
        raise NoCodec("zstandard is not installed here") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT)
    return decompressor.stream_reader(io.BytesIO(body)).read(HEADER_LIMIT)


def decompress_brotli_start(body: bytes) -> bytes:
    """The same of a body that brotli packed; NoCodec without a brotli that can stop at a length."""
    try:
        import brotli
    except ImportError:
        raise NoCodec("brotli is not installed here") from None
    reader = brotli.Decompressor()
    if not hasattr(reader, "can_accept_more_data"):
        raise NoCodec("brotli is older than 1.2 here")
    return reader.process(body, output_buffer_limit=HEADER_LIMIT)
