"""Signatures of images: an in-toto statement in a DSSE envelope, by a key in a file, made and checked offline.

    envelope = sign(statement("cpu-1.0.0", digest, predicate), private_key)
    predicate = verify(envelope, public_key, digest=digest, what="...")

Keys are PEM files as `openssl genpkey` writes them: Ed25519, or ECDSA on P-256. The formats are those of others
(in-toto Statement v1, DSSE v1.0.2), so other tools can check what is signed here. Nothing is asked of a network.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.record.canonical import dumps, loads
from apertus_nemo.record.files import read_bytes

ENVELOPE = "application/vnd.dsse.envelope.v1+json"
STATEMENT = "application/vnd.in-toto+json"
PREDICATE = "urn:apertus-nemo:image:v1"
MAX_ENVELOPE_BYTES = 2**20
_TYPE = "https://in-toto.io/Statement/v1"
_MAX_KEY_BYTES = 64 * 1024


def statement(name: str, digest: str, predicate: dict[str, Any]) -> bytes:
    """What is signed: that this manifest digest is this image, with what `predicate` says of it."""
    subject = {"digest": {"sha256": digest.removeprefix("sha256:")}, "name": name}
    return dumps({"_type": _TYPE, "predicate": predicate, "predicateType": PREDICATE, "subject": [subject]})


def pre_authentication(payload: bytes, payload_type: str = STATEMENT) -> bytes:
    """The bytes that the key signs (DSSE v1.0.2, "PAE")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: Path) -> bytes:
    """The envelope; the same bytes each time with Ed25519. Raises InputError where the key cannot be used."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(read_bytes(key, max_bytes=_MAX_KEY_BYTES), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key}: is not a private key in PEM form without a password") from error
    data = pre_authentication(payload)
    if isinstance(private, ed25519.Ed25519PrivateKey):
        signature = private.sign(data)
    elif isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(private.curve, ec.SECP256R1):
        signature = private.sign(data, ec.ECDSA(SHA256()))
    else:
        raise InputError(f"{key}: is a key of another kind: make one with `openssl genpkey -algorithm ed25519`")
    return dumps(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": STATEMENT,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        }
    )


def verify(envelope: bytes, key: Path, *, digest: str, what: str) -> dict[str, Any]:
    """The predicate of an envelope that `key` has signed and that speaks of the manifest `digest`.

    Raises Differs where key or digest is another one, InputError where envelope or key is malformed.
    """
    public = public_key(key)
    payload, signatures = _opened(envelope, what)
    if not any(_signed(public, one, pre_authentication(payload)) for one in signatures):
        raise Differs(f"{what}: it is not signed by {key}")
    said = loads(payload, what=f"{what}: its payload")
    subjects = said.get("subject") if isinstance(said, dict) and said.get("_type") == _TYPE else None
    if not isinstance(subjects, list) or not all(isinstance(one, dict) for one in subjects):
        raise InputError(f"{what}: its payload is not an in-toto statement")
    digests = [one["digest"].get("sha256") for one in subjects if isinstance(one.get("digest"), dict)]
    if said.get("predicateType") != PREDICATE or digest.removeprefix("sha256:") not in digests:
        raise Differs(f"{what}: what is signed is not that this is the image {digest}")
    predicate = said.get("predicate")
    return predicate if isinstance(predicate, dict) else {}


def public_key(key: Path) -> Any:
    """A key that `verify` can use; raises InputError for any other file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(read_bytes(key, max_bytes=_MAX_KEY_BYTES))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key}: is not a public key in PEM form") from error
    if not isinstance(public, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey):
        raise InputError(f"{key}: is a key of another kind than Ed25519 and ECDSA")
    return public


def _opened(envelope: bytes, what: str) -> tuple[bytes, list[bytes]]:
    """(payload, signatures)."""
    tree = loads(envelope, what=what, max_bytes=MAX_ENVELOPE_BYTES)
    try:
        if tree["payloadType"] != STATEMENT:
            raise InputError(f"{what}: its payload is of another type than {STATEMENT}")
        payload = base64.b64decode(tree["payload"], validate=True)
        return payload, [base64.b64decode(one["sig"], validate=True) for one in tree["signatures"][:16]]
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise InputError(f"{what}: is not a DSSE envelope") from error


def _signed(public: Any, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        if isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(signature, data, ec.ECDSA(SHA256()))
        else:
            public.verify(signature, data)
    except InvalidSignature:
        return False
    return True
