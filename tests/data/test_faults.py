"""What the network and the object store can do to a run: each ends in the right bytes or the right error.

Against a real S3 server (SeaweedFS) through a proxy that hurts requests. Timeouts are shortened, nothing else.
"""

import math
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from torch import Tensor

from pipeline import storage
from pipeline.data import patience, ranged_get
from pipeline.data import reader as reader_module
from pipeline.data.fetch import HttpFetch, read_range
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.reader import REQUEST_BYTES, IntegrityError
from pipeline.data.views import View
from pipeline.storage import DeniedError, MissingError, StorageError
from tests.conftest import S3
from tests.data.hurting_proxy import Chunked, Close, Cut, Fault, Fin, Flip, HurtingProxy, Longer, Stall, Status, Trickle
from tests.data.images import write_photos

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]  # never a hang

COUNT = 60


@pytest.fixture
def manifest(s3: S3) -> Manifest:
    return write_photos(f"{s3.url}/shards", COUNT)


@pytest.fixture
def proxy(s3: S3, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HurtingProxy]:
    """Between this process and the server from now on; the shards were written without it."""
    proxy = HurtingProxy(s3.server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(patience, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(patience, "PATIENCE_S", 4.0)
    monkeypatch.setattr(ranged_get, "READ_BYTES", 2**12)  # bodies are longer here too
    yield proxy
    proxy.stop()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path = folder / "certificate.pem"
    path.write_bytes(
        certificate.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def epoch(manifest: Manifest, num_workers: int = 0) -> list[Tensor]:
    loader = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=12, seed=0, num_workers=num_workers)
    batches = list(loader.batches(0, loader.steps_per_epoch))
    return [*(batch.sample_ids for batch in batches), *(batch.views[0] for batch in batches)]


@pytest.fixture
def undisturbed(manifest: Manifest) -> list[Tensor]:
    return epoch(manifest)


HEALED: dict[str, list[Fault]] = {
    "503 and 500": [Status(503), Status(500)],
    "429": [Status(429)],
    "cut mid-body": [Cut(0.5), Cut(0.9)],
    "cut at once": [Cut(0.0), Cut(0.0), Cut(0.0)],
    "FIN mid-body": [Fin(0.5), Fin(0.3)],
    "stall": [Stall(0.5), Stall(0.0)],
    "connections of one request": [Close(), Close(), Close()],
    "more than was asked for": [Longer(), Longer()],
    "bodies in chunks": [Chunked(), Chunked()],
    "bit flip in a payload": [Flip(0)] * 2,  # the offset is set below
}


@pytest.mark.parametrize("request_bytes", [0, REQUEST_BYTES])  # the first batch is read one by one, or in blocks
@pytest.mark.parametrize("name", HEALED)
def test_a_passing_fault_leaves_no_trace(
    name: str,
    request_bytes: int,
    manifest: Manifest,
    undisturbed: list[Tensor],
    proxy: HurtingProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader_module, "REQUEST_BYTES", request_bytes)
    faults = HEALED[name]
    if name == "bit flip in a payload":
        middle = int(manifest.samples.offset[3] + manifest.samples.length[3] // 2)
        faults = [Flip(middle)] * 2
    proxy.faults.extend(faults)
    started = time.monotonic()
    seen = epoch(manifest)
    assert all(map(torch.equal, seen, undisturbed))
    assert not proxy.faults, "every fault struck"
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("size", [1000, 5000, 30_000])
def test_a_slow_body_is_there_when_its_last_byte_is(
    size: int, manifest: Manifest, undisturbed: list[Tensor], proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kernel has of it when it is asked: nobody waits for more bytes than there will be."""
    monkeypatch.setattr(patience, "TIMEOUT_S", 40.0)
    proxy.always = Trickle(size)
    started = time.monotonic()
    assert all(map(torch.equal, epoch(manifest), undisturbed))
    assert time.monotonic() - started < patience.TIMEOUT_S


def test_faults_behind_tls_heal_alike(
    manifest: Manifest, undisturbed: list[Tensor], s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call of the kernel fills the buffer there."""
    certificate = self_signed(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    proxy = HurtingProxy(s3.server.endpoint, tls)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(patience, "TIMEOUT_S", 1.0)
    started = time.monotonic()
    with pytest.raises(StorageError, match="AWS_CA_BUNDLE"):
        epoch(manifest)
    assert time.monotonic() - started < patience.PATIENCE_S, "it is not waited out"
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    proxy.faults.extend([Status(503), Cut(0.5), Fin(0.5), Stall(0.5), Close()])
    assert all(map(torch.equal, epoch(manifest), undisturbed))
    assert not proxy.faults
    proxy.stop()


def test_faults_strike_loader_workers_alike(manifest: Manifest, undisturbed: list[Tensor], proxy: HurtingProxy) -> None:
    proxy.faults.extend([Status(503), Cut(0.5), Fin(0.5), Stall(0.5)])  # the stall takes the full 5 s here
    seen = epoch(manifest, num_workers=2)
    assert all(map(torch.equal, seen, undisturbed))
    assert not proxy.faults


def test_refused_connections_are_waited_out(manifest: Manifest, undisturbed: list[Tensor], proxy: HurtingProxy) -> None:
    proxy.down()
    threading.Timer(1.5, proxy.up).start()
    assert all(map(torch.equal, epoch(manifest), undisturbed))


def test_refused_for_good_is_an_error_that_names_the_endpoint(manifest: Manifest, proxy: HurtingProxy) -> None:
    storage.sign(manifest.shard_url(0))
    proxy.down()
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"ConnectionRefusedError.*is the endpoint up"):
        epoch(manifest)
    assert time.monotonic() - started < 15
    proxy.up()


def test_progress_renews_the_patience(
    manifest: Manifest, undisturbed: list[Tensor], proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 ends in a row, each after some bytes: more than PATIENCE_S in all, never that long without a byte."""
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    monkeypatch.setattr(patience, "MIN_BYTES_PER_S", 1)
    proxy.faults.extend([Fin(0.2)] * 30)
    assert all(map(torch.equal, epoch(manifest), undisturbed))
    assert not proxy.faults


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, DeniedError, "access denied"),
        (403, DeniedError, "check the credentials"),
        (404, MissingError, "the manifest lists it"),
        (412, ranged_get.ReplacedError, "was replaced"),
        (418, StorageError, "unexpected HTTP 418"),
    ],
)
def test_what_no_retry_heals_is_an_error_at_once(
    status: int, error: type[StorageError], words: str, manifest: Manifest, proxy: HurtingProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a patience that has no end: an error that came of waiting would never come."""
    monkeypatch.setattr(patience, "PATIENCE_S", math.inf)
    loader = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=12, seed=0)
    batches = loader.batches(0, 1000)
    next(batches)  # mid-run
    proxy.always = Status(status)
    with pytest.raises(error, match=words):
        list(batches)


def test_a_flip_at_rest_is_an_error_that_names_the_sample(manifest: Manifest, proxy: HurtingProxy) -> None:
    proxy.always = Flip(int(manifest.samples.offset[7]) + 5)
    with pytest.raises(IntegrityError, match=r"sample (7|27|47) .*crc32"):  # the same offset in each of the 3 shards
        epoch(manifest)


def test_a_flip_in_a_tar_header_loses_nothing(
    manifest: Manifest, undisturbed: list[Tensor], proxy: HurtingProxy
) -> None:
    proxy.always = Flip(int(manifest.samples.offset[7]) - 512 + 3)  # in the name of the sample's member
    assert all(map(torch.equal, epoch(manifest), undisturbed))


def test_a_truncated_shard_is_an_error_before_and_in_the_run(s3: S3, manifest: Manifest) -> None:
    url = manifest.shard_url(1)
    storage.write_bytes(url, storage.read_bytes(url)[:-4096])
    with pytest.raises(StorageError, match=r"train-000001.tar has \d+ bytes, not"):
        manifest.verify_present()
    with pytest.raises(StorageError, match=r"train-000001.tar ends at byte .* truncated"):
        epoch(manifest)


def test_an_object_replaced_under_the_run_is_an_error(s3: S3, manifest: Manifest) -> None:
    """Same size, other content, while a range is being read and taken up again."""
    reader = HttpFetch(manifest)
    read_range(reader, 0, 0, 1000)
    data = bytearray(storage.read_bytes(manifest.shard_url(0)))
    data[100] ^= 1
    storage.write_bytes(manifest.shard_url(0), bytes(data))
    with pytest.raises(ranged_get.ReplacedError, match=r"train-000000\.tar was replaced"):
        read_range(reader, 0, 1000, 2000)


def test_a_missing_shard_is_named_before_the_run(manifest: Manifest) -> None:
    storage.delete(manifest.shard_url(2))
    with pytest.raises(StorageError, match=r"train-000002\.tar is missing"):
        manifest.verify_present()


def test_a_signature_that_expired_mid_run_is_renewed(
    manifest: Manifest, undisturbed: list[Tensor], proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SIGNATURE_LIFETIME_S", 2)
    loader = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=12, seed=0)
    seen = []
    for batch in loader.batches(0, loader.steps_per_epoch):
        seen.append(batch.sample_ids)
        time.sleep(0.8)
    assert all(map(torch.equal, seen, undisturbed[: len(seen)]))


def test_any_fsspec_url_streams() -> None:
    """No fast path: fsspec's in-memory file system, in this process."""
    manifest = write_photos("memory://shards", 30)
    assert len(epoch(manifest)) == 4


def test_writes_and_reads_of_the_control_plane_outlast_a_500(s3: S3, proxy: HurtingProxy, manifest: Manifest) -> None:
    proxy.faults.extend([Status(500), Status(503)])
    assert storage.read_bytes(manifest.shard_url(0))[:512].strip(b"\0")
    assert not proxy.faults
