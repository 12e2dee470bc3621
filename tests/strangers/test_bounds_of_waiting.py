"""No byte now and then keeps a run waiting, no passing refusal ends it, and whoever waits says for what.

A real S3 server behind a proxy that hurts its answers; times are shortened, nothing else.
"""

import itertools
import logging
import os
import re
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import storage, waiting
from pipeline.data import hedging, patience, ranged_get
from pipeline.data import loader as loader_module
from pipeline.data.fetch import HttpFetch, StorageFetch, read_range
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.views import View
from pipeline.storage import DeniedError, StorageError
from pipeline.waiting import Waiting
from tests import servers
from tests.data.hurting_proxy import (
    Drip,
    DripHeaders,
    Fault,
    Fin,
    HurtingProxy,
    Late,
    Rangeless,
    Redirect,
    Shifted,
    Status,
)
from tests.data.images import write_photos
from tests.data.test_faults import self_signed

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def manifest(s3_server: servers.S3Server) -> Iterator[Manifest]:
    """One shard of 100 kB and more."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3_server.env.items():
            patch.setenv(key, value)
        yield write_photos(f"{s3_server.new_bucket()}/shards", 150, samples_per_shard=150)


@pytest.fixture(scope="module")
def content(manifest: Manifest) -> bytes:
    content = storage.read_bytes(manifest.shard_url(0))
    assert len(content) > 100_000
    return content


@pytest.fixture(scope="module")
def one_proxy(s3_server: servers.S3Server) -> Iterator[HurtingProxy]:
    """For all tests: s3fs takes a second for each new endpoint."""
    proxy = HurtingProxy(s3_server.endpoint)
    yield proxy
    proxy.stop()


@pytest.fixture
def proxy(
    one_proxy: HurtingProxy, s3_server: servers.S3Server, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> HurtingProxy:
    """Between this process and the server from now on; hurts nothing yet."""
    return between(one_proxy, s3_server, monkeypatch)


@pytest.fixture
def impatient(proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what ends in an error in any case."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.8)


@pytest.fixture(scope="module")
def one_tls_proxy(
    tmp_path_factory: pytest.TempPathFactory, s3_server: servers.S3Server
) -> Iterator[tuple[HurtingProxy, Path]]:
    """And its certificate."""
    certificate = self_signed(tmp_path_factory.mktemp("tls"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    proxy = HurtingProxy(s3_server.endpoint, tls)
    yield proxy, certificate
    proxy.stop()


@pytest.fixture
def tls_proxy(
    one_tls_proxy: tuple[HurtingProxy, Path],
    s3_server: servers.S3Server,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> HurtingProxy:
    proxy, certificate = one_tls_proxy
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    return between(proxy, s3_server, monkeypatch)


def between(proxy: HurtingProxy, server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> HurtingProxy:
    proxy.calm()
    for key, value in server.env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    shorten(monkeypatch)
    return proxy


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that counts as progress stays what it is."""
    monkeypatch.setattr(patience, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(patience, "PATIENCE_S", 2.0)
    monkeypatch.setattr(ranged_get, "TICK_S", 0.1)
    monkeypatch.setattr(ranged_get, "READ_BYTES", 2**12)
    monkeypatch.setattr(hedging, "LEAST_S", 0.2)


def code(status: int, name: str, text: str = "", *headers: tuple[str, str]) -> Status:
    """An error as S3 writes it."""
    return Status(status, headers, f"<Error><Code>{name}</Code><Message>{text}</Message></Error>")


# What is slow


def test_a_connection_that_drips_is_left_for_a_new_one(manifest: Manifest, content: bytes, proxy: HurtingProxy) -> None:
    proxy.faults.append(Drip(1000))
    assert read_range(HttpFetch(manifest), 0, 0, len(content)) == content
    assert proxy.requests == 2


def test_a_connection_that_begins_to_drip_is_left_with_what_it_gave(
    manifest: Manifest, content: bytes, proxy: HurtingProxy
) -> None:
    proxy.faults.append(Drip(1000, share=0.5))
    assert read_range(HttpFetch(manifest), 0, 0, len(content)) == content
    first, second = (int(headers["Range"].removeprefix("bytes=").split("-")[0]) for headers in proxy.asked)
    assert first == 0
    assert second > len(content) // 2
    assert proxy.asked[1]["If-Match"]


def test_a_drip_behind_tls_is_left_too(manifest: Manifest, content: bytes, tls_proxy: HurtingProxy) -> None:
    tls_proxy.faults.extend([Drip(1000), Drip(1000, share=0.5)])
    assert read_range(HttpFetch(manifest), 0, 0, len(content)) == content
    assert tls_proxy.requests == 3


@pytest.mark.usefixtures("impatient")
def test_where_every_connection_drips_the_error_names_shard_rate_and_minimum(
    manifest: Manifest, content: bytes, proxy: HurtingProxy
) -> None:
    proxy.always = Drip(1000)
    words = r"train-000000\.tar: \d\.\d kB of .* kB/s, .* TimeoutError: \d+ bytes in \d s; .*less than 4\.0 kB/s"
    with pytest.raises(StorageError, match=words):
        read_range(HttpFetch(manifest), 0, 0, len(content))
    assert proxy.requests > 2, "others were tried"


def test_a_store_that_is_slow_as_a_whole_works(
    manifest: Manifest, content: bytes, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home link: what is usual there is no reason for second requests."""
    monkeypatch.setattr(hedging, "ENOUGH", 2)
    monkeypatch.setattr(hedging, "_LONG_BYTES", 1000)
    fetch = HttpFetch(manifest)
    proxy.always = Drip(20_000)
    for start in range(0, 24_000, 8_000):
        assert read_range(fetch, 0, start, start + 8_000) == content[start : start + 8_000]
    assert proxy.requests == 3


def test_a_request_far_slower_than_others_is_raced_by_a_second_one(
    manifest: Manifest, content: bytes, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 kB/s are progress, but not where others get them in a moment."""
    monkeypatch.setattr(patience, "TIMEOUT_S", 30.0)
    monkeypatch.setattr(hedging, "_LONG_BYTES", 1000)
    fetch = HttpFetch(manifest)
    for start in range(hedging.ENOUGH):
        read_range(fetch, 0, start, start + 50_000)
    proxy.requests = 0
    proxy.faults.append(Drip(40_000))
    assert read_range(fetch, 0, 0, len(content)) == content
    assert proxy.requests == 2


def test_a_late_answer_loses_against_a_second_request(manifest: Manifest, content: bytes, proxy: HurtingProxy) -> None:
    proxy.faults.append(Late(50))
    assert read_range(HttpFetch(manifest), 0, 0, len(content)) == content
    assert proxy.requests == 2


def test_a_first_request_that_answers_late_still_counts(
    manifest: Manifest, content: bytes, proxy: HurtingProxy
) -> None:
    """Where the store takes longer than a second request is given, the first one is kept."""
    proxy.always = Late(1.3)
    assert read_range(HttpFetch(manifest), 0, 0, len(content)) == content
    assert proxy.asked[0]["Range"] == proxy.asked[-1]["Range"]


def test_a_store_behind_tls_that_always_answers_late_works(
    manifest: Manifest, content: bytes, tls_proxy: HurtingProxy
) -> None:
    """What TLS tells of its sessions is no answer: the request is neither given up for it nor raced too late."""
    tls_proxy.always = Late(1.3)
    assert read_range(HttpFetch(manifest), 0, 0, len(content)) == content
    assert 1 < tls_proxy.requests < 4


def test_headers_that_drip_are_left_for_a_new_connection(
    manifest: Manifest, content: bytes, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = HttpFetch(manifest)
    proxy.faults.append(DripHeaders())
    assert read_range(fetch, 0, 0, len(content)) == content
    assert proxy.requests == 2
    monkeypatch.setattr(patience, "PATIENCE_S", 0.8)
    proxy.always = DripHeaders()
    with pytest.raises(StorageError, match="TimeoutError: an answer that began did not end"):
        read_range(fetch, 0, 0, len(content))


def test_what_came_with_the_headers_behind_tls_is_not_lost(
    manifest: Manifest, content: bytes, tls_proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing more comes for a while."""
    monkeypatch.setattr(ranged_get, "TICK_S", 0.01)
    monkeypatch.setattr(patience, "TIMEOUT_S", 10.0)
    monkeypatch.setattr(patience, "PATIENCE_S", 30.0)
    tls_proxy.faults.append(Drip(100_000, share=0.04))
    assert read_range(HttpFetch(manifest), 0, 0, 50_000) == content[:50_000]
    assert tls_proxy.requests == 1


def test_a_second_request_that_is_refused_does_not_end_the_first(
    manifest: Manifest, content: bytes, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 kB/s are too little to be left alone."""
    monkeypatch.setattr(patience, "PATIENCE_S", 30.0)
    proxy.faults.append(Drip(3000))
    proxy.always = Status(404)
    assert read_range(HttpFetch(manifest), 0, 0, 4000) == content[:4000]
    assert proxy.requests > 1


def test_a_connection_that_was_closed_meanwhile_is_not_asked(
    manifest: Manifest, content: bytes, proxy: HurtingProxy
) -> None:
    """Without a word in its last answer, as after a server's idle time."""
    fetch = HttpFetch(manifest)
    proxy.always = Fin(1.0)
    failures: list[Exception] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience.Patience, "failed", lambda _, error: failures.append(error))
        for start in range(0, 3000, 1000):
            assert read_range(fetch, 0, start, start + 1000) == content[start : start + 1000]
            time.sleep(0.05)
    assert not failures


# What is refused


def test_a_refused_signature_is_made_anew_once(manifest: Manifest, content: bytes, proxy: HurtingProxy) -> None:
    fetch = HttpFetch(manifest)
    for refusal in (
        Status(403),
        Status(401),
        code(400, "ExpiredToken", "The provided token has expired."),
        code(403, "RequestTimeTooSkewed"),
    ):
        proxy.faults.append(refusal)
        assert read_range(fetch, 0, 0, 1000) == content[:1000]
    assert proxy.requests == 8


def test_a_second_refusal_is_an_error(manifest: Manifest, proxy: HurtingProxy) -> None:
    proxy.always = code(403, "AccessDenied", "Not for you")
    with pytest.raises(DeniedError, match=r"train-000000\.tar: access denied .*AccessDenied: Not for you"):
        read_range(HttpFetch(manifest), 0, 0, 1000)
    assert proxy.requests == 2


def test_credentials_that_were_replaced_in_their_file_are_read_anew(
    manifest: Manifest,
    content: bytes,
    proxy: HurtingProxy,
    s3_server: servers.S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real server refuses the old ones."""

    def write(secret: str) -> None:
        file.write_text(f"[default]\naws_access_key_id={s3_server.access_key}\naws_secret_access_key={secret}\n")

    file = tmp_path / "credentials"
    write("old")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DeniedError, match="SignatureDoesNotMatch"):
        read_range(HttpFetch(manifest), 0, 0, 1000)
    write(s3_server.secret_key)
    assert read_range(HttpFetch(manifest), 0, 0, 1000) == content[:1000]
    assert proxy.requests == 4


def test_a_clock_that_is_off_is_named(manifest: Manifest, proxy: HurtingProxy) -> None:
    date = ("Date", "Mon, 01 Jan 2024 00:00:00 GMT")
    proxy.always = code(403, "RequestTimeTooSkewed", "The difference is too large.", date)
    with pytest.raises(DeniedError, match=r"RequestTimeTooSkewed.*this machine's clock is \d+ s ahead of"):
        read_range(HttpFetch(manifest), 0, 0, 1000)


def test_a_redirect_is_followed_with_range_and_etag(
    manifest: Manifest, content: bytes, proxy: HurtingProxy, s3_server: servers.S3Server
) -> None:
    there = HurtingProxy(s3_server.endpoint, host=proxy.endpoint.removeprefix("http://"))
    fetch = HttpFetch(manifest)
    assert read_range(fetch, 0, 0, 10) == content[:10]
    for status in (307, 301, 302, 303, 308):
        proxy.faults.append(Redirect(f"{there.endpoint}{{path}}", status))
        assert read_range(fetch, 0, 1000, 3000) == content[1000:3000]
    assert (proxy.requests, there.requests) == (6, 5)
    assert {headers["Range"] for headers in there.asked} == {"bytes=1000-2999"}
    assert {headers["If-Match"] for headers in there.asked} == {proxy.asked[1]["If-Match"]}
    there.stop()


def test_redirects_in_a_circle_are_an_error(manifest: Manifest, proxy: HurtingProxy) -> None:
    proxy.always = Redirect("{path}")  # a relative one, to itself
    with pytest.raises(StorageError, match=r"train-000000\.tar: more than 5 redirects"):
        read_range(HttpFetch(manifest), 0, 0, 1000)
    assert proxy.requests == 6


ASTRAY = [
    *("file://{path}", "ftp://127.0.0.1{path}", "http://user:secret@127.0.0.1{path}"),
    *("http://[127.0.0.1{path}", "http://127.0.0.1:80a{path}", "http://127.0.0.1:99999{path}", "http://a b{path}"),
]


@pytest.mark.parametrize("to", ASTRAY)
def test_a_redirect_that_leads_astray_is_refused_without_telling_the_signature(
    to: str, manifest: Manifest, proxy: HurtingProxy
) -> None:
    proxy.always = Redirect(to)
    with pytest.raises(StorageError, match=r"HTTP 307.*is not followed") as error:
        read_range(HttpFetch(manifest), 0, 0, 1000)
    assert "Signature" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_redirect_from_https_to_http_is_refused(
    manifest: Manifest, tls_proxy: HurtingProxy, s3_server: servers.S3Server
) -> None:
    tls_proxy.always = Redirect(f"{s3_server.endpoint}{{path}}")
    with pytest.raises(StorageError, match="leads from https: to http:"):
        read_range(HttpFetch(manifest), 0, 0, 1000)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            code(301, "PermanentRedirect", "", ("x-amz-bucket-region", "eu-central-1")),
            "AWS_DEFAULT_REGION=eu-central-1",
        ),
        (code(301, "PermanentRedirect"), "another region or endpoint: set AWS_DEFAULT_REGION"),
        (
            Status(400, (), "<Code>AuthorizationQueryParametersError</Code><Region>us-west-2</Region>"),
            "AWS_DEFAULT_REGION=us-west-2",
        ),
    ],
)
def test_a_bucket_elsewhere_is_an_error_that_names_the_region(
    answer: Status, words: str, manifest: Manifest, proxy: HurtingProxy
) -> None:
    proxy.always = answer
    with pytest.raises(StorageError, match=words):
        read_range(HttpFetch(manifest), 0, 0, 1000)


# What passes


PASSING: list[Fault] = [
    *(Status(status) for status in (408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524)),
    code(400, "RequestTimeout", "Your socket connection to the server was not read from or written to"),
    code(400, "SlowDown"),
    Shifted(7),
]


def test_what_passes_is_asked_for_again(manifest: Manifest, content: bytes, proxy: HurtingProxy) -> None:
    fetch = HttpFetch(manifest)
    for number, fault in enumerate(PASSING, 1):
        proxy.faults.append(fault)
        assert read_range(fetch, 0, 100, 1000) == content[100:1000]
        assert proxy.requests == 2 * number


def test_a_416_for_a_range_that_the_object_has_passes(manifest: Manifest, content: bytes, proxy: HurtingProxy) -> None:
    proxy.faults.append(Status(416, (("Content-Range", f"bytes */{len(content)}"),)))
    assert read_range(HttpFetch(manifest), 0, 100, 1000) == content[100:1000]
    proxy.faults.append(Status(416, (("Content-Range", "bytes */4096"),)))
    with pytest.raises(StorageError, match=r"train-000000\.tar ends at byte 4096, the manifest says"):
        read_range(HttpFetch(manifest), 0, 100, 1000)


def test_the_store_is_asked_again_when_it_says(manifest: Manifest, content: bytes, proxy: HurtingProxy) -> None:
    proxy.faults.append(Status(503, (("Retry-After", "1"),)))
    assert read_range(HttpFetch(manifest), 0, 0, 1000) == content[:1000]
    first, second = proxy.asked_at
    assert second - first >= 1


@pytest.mark.usefixtures("impatient")
def test_a_store_that_wants_an_hour_does_not_get_it(manifest: Manifest, proxy: HurtingProxy) -> None:
    proxy.always = Status(429, (("Retry-After", "3600"),))
    with pytest.raises(StorageError, match="HTTP 429"):
        read_range(HttpFetch(manifest), 0, 0, 1000)
    assert proxy.requests >= 2, "once more at the end of the patience"


def test_a_server_without_ranges_serves_beginnings_and_is_named_otherwise(
    manifest: Manifest, content: bytes, proxy: HurtingProxy
) -> None:
    proxy.always = Rangeless()
    fetch = HttpFetch(manifest)
    assert read_range(fetch, 0, 0, len(content)) == content
    assert read_range(fetch, 0, 0, 1000) == content[:1000]
    with pytest.raises(StorageError, match=r"HTTP 200 .*the whole object instead of bytes 1000 to 2000.*Range"):
        read_range(fetch, 0, 1000, 2000)


# Other stores


def elsewhere(manifest: Manifest, proxy: HurtingProxy) -> Manifest:
    """The same shards on a web server, through fsspec."""
    bucket = manifest.url.removeprefix("s3://")
    return replace(manifest, url=f"{proxy.endpoint}/{bucket}")


@pytest.mark.usefixtures("impatient")
def test_a_web_server_s_statuses_are_told_apart(manifest: Manifest, proxy: HurtingProxy) -> None:
    fetch = StorageFetch(elsewhere(manifest, proxy))
    for status, requests in ((403, 2), (400, 1)):
        proxy.requests, proxy.always = 0, Status(status)
        with pytest.raises(StorageError, match=str(status)):
            read_range(fetch, 0, 0, 1000)
        assert proxy.requests == requests
    proxy.always = Status(503)
    with pytest.raises(StorageError, match=r"less than 4\.0 kB/s"):
        read_range(fetch, 0, 0, 1000)


def test_s3_behind_a_web_proxy_is_signed_anew_and_does_not_drip_for_ever(
    manifest: Manifest, content: bytes, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = StorageFetch(manifest)
    proxy.faults.append(Status(403))
    assert read_range(fetch, 0, 0, 1000) == content[:1000]
    monkeypatch.setattr(storage, "RANGE_TIMEOUT_S", 0.5)
    proxy.faults.append(Drip(1000))
    assert read_range(fetch, 0, 0, len(content)) == content
    proxy.always = Drip(1000)
    with pytest.raises(StorageError, match=r"train-000000\.tar.*less than 4\.0 kB/s"):
        read_range(fetch, 0, 0, len(content))


# What is told


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "pipeline.waiting"]


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.02)


def test_many_waits_are_one_line_every_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.5)
    released = threading.Event()

    def wait(number: int) -> None:
        with Waiting(lambda: f"thing {number}"):
            released.wait()

    with ThreadPoolExecutor(20) as threads:
        for number in range(20):
            threads.submit(wait, number)
        until(lambda: len(lines(caplog)) == 3)
        released.set()
    assert "s for thing 0; " in lines(caplog)[0].message
    assert lines(caplog)[0].message.endswith("and 17 more")
    times = [record.created for record in lines(caplog)]
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) > 0.45


@pytest.mark.usefixtures("impatient")
def test_a_slow_store_is_told_with_shard_rate_and_last_error(
    manifest: Manifest,
    content: bytes,
    proxy: HurtingProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.6)
    proxy.always = Drip(1000)
    with pytest.raises(StorageError):
        read_range(HttpFetch(manifest), 0, 0, len(content))
    told = lines(caplog)[-1].message
    assert re.search(r"train-000000\.tar: .* kB/s, \d failed, the last with TimeoutError: \d+ bytes in", told)


def batches(manifest: Manifest, num_workers: int) -> Iterator[object]:
    loader = Loader(manifest, "train", (View(),), image_size=16, global_batch_size=10, seed=0, num_workers=num_workers)
    return loader.batches(0, 10)


def test_a_store_that_holds_up_the_reader_is_told_though_each_read_moves_on(
    manifest: Manifest, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.3)
    proxy.always = Drip(100_000)
    next(batches(manifest, num_workers=0))
    assert "s for the blocks of step 0; " in lines(caplog)[0].message
    assert "train-000000.tar: " in lines(caplog)[0].message, "what is under way"


def test_what_a_loader_worker_waits_for_reaches_the_training_process(
    manifest: Manifest, proxy: HurtingProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shortened = "import pipeline.waiting as w; w.TELL_EVERY_S = 0.3; "
    monkeypatch.setattr(loader_module, "_WORKER", shortened + loader_module._WORKER)
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.5)
    proxy.faults.extend([Late(2)] * 4)  # as many as threads
    next(batches(manifest, num_workers=1))
    told = [record.message for record in lines(caplog) if "train-000000.tar" in record.message]
    assert "the batch of step 0 from the loader workers" in told[0]


def test_a_loader_worker_that_hangs_is_named(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.3)
    pids: list[int] = []
    start = subprocess.Popen

    def noted(*arguments: object, **options: object) -> object:
        process = start(*arguments, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", noted)
    iterator = batches(manifest, num_workers=1)
    next(iterator)
    os.kill(pids[0], signal.SIGSTOP)
    rest = threading.Thread(target=lambda: list(iterator))
    rest.start()
    until(lambda: any(f"from the loader workers {pids[0]}" in record.message for record in lines(caplog)))
    os.kill(pids[0], signal.SIGCONT)
    rest.join()
