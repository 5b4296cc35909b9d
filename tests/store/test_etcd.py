"""What only the etcd store does: lost answers, its own leases, certificates, refusals; against one true member."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.store.backends import heard, keys, told
from tests.store.engine import MISSING, Engine, free_port, fresh_origin, installed, one_member
from tests.store.proxy import Fault, Proxy, proxy_of
from towpath.store.contract import (
    Absent,
    Change,
    Compare,
    Delete,
    HasValue,
    LeaseGone,
    OutcomeUnknown,
    Put,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TxnResult,
)
from towpath.store.etcd.gateway import Limits
from towpath.store.etcd.store import EtcdStore

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)

LIMITS = Limits(connect=0.3, attempt=1.0, total=3.0, pause=0.02, ping=0.5)
_numbers = itertools.count()


def new_store(endpoint: str, prefix: str = "") -> EtcdStore:
    prefix = prefix or f"/etcd-{next(_numbers)}/"
    return EtcdStore((endpoint,), prefix, limits=LIMITS, origin=fresh_origin(one_member()))


@pytest.fixture
async def store() -> AsyncIterator[EtcdStore]:
    store = new_store(one_member().endpoint)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with proxy_of(one_member().endpoint) as proxy:
        yield proxy


@pytest.fixture
async def lossy(proxy: Proxy) -> AsyncIterator[EtcdStore]:
    """A store behind `proxy` that holds a=1, p/1, p/2."""
    store = new_store(proxy.endpoint)
    await store.open()
    await store.txn((), (Put("a", b"1"), Put("p/1", b""), Put("p/2", b"")))
    yield store
    await store.close()


# --- answers that are lost -------------------------------------------------------------------------------------------

Txn = tuple[tuple[Compare, ...], tuple[Change, ...], tuple[Change, ...]]


@pytest.mark.parametrize(
    ("txn", "want"),
    [
        pytest.param(((), (Put("b", b"2"),), ()), TxnResult(True, 2, (), ("b",)), id="put"),
        pytest.param(
            ((Absent("b"),), (Put("b", b"2"),), ()), TxnResult(True, 2, (), ("b",)), id="a claim that holds only once"
        ),
        pytest.param(
            ((HasValue("a", b"1"),), (Put("a", b"2"), Delete("none"), Delete("p/", prefix=True)), ()),
            TxnResult(True, 2, (), ("a", "p/1", "p/2")),
            id="deletions, of which one finds nothing",
        ),
        pytest.param(
            ((Absent("b"), Absent("a"), HasValue("a", b"9")), (Put("x", b""),), (Delete("p/1"), Put("b", b""))),
            TxnResult(False, 2, (1, 2), ("b", "p/1")),
            id="the other branch",
        ),
        pytest.param(
            ((Absent("a"),), (Put("a", b"2"),), ()), TxnResult(False, 1, (0,), ()), id="compares that do not hold"
        ),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
async def test_a_transaction_whose_answer_is_lost_is_applied_once_and_answered(
    lossy: EtcdStore, proxy: Proxy, txn: Txn, want: TxnResult, times: int
) -> None:
    watch = lossy.watch("")
    proxy.faults = [Fault.LOSE_ANSWER] * times
    result = await lossy.txn(*txn)
    assert (result.ok, result.failed, result.changed) == (want.ok, want.failed, want.changed)
    assert result.revision == want.revision
    await lossy.put("end", b"")
    assert len(await heard_by(watch, "end")) == (2 if want.changed else 1)


async def heard_by(watch: object, key: str) -> list[list[str]]:
    """What a watch tells until `key` is put."""
    said: list[list[str]] = []
    async with asyncio.timeout(5):
        while not said or f"+{key}=" not in said[-1]:
            said.append(told(await anext(watch)))  # type: ignore[call-overload]
    return said


async def test_a_request_that_arrives_late_is_not_applied_any_more(lossy: EtcdStore, proxy: Proxy) -> None:
    proxy.faults = [Fault.HOLD]
    assert await lossy.put("a", b"2") == 2
    assert await lossy.put("a", b"3") == 3
    await proxy.release()
    item = await lossy.get("a")
    assert item
    assert (item.value, item.revision) == (b"3", 3)


async def test_a_late_request_is_not_applied_when_its_compares_did_not_hold_at_first(
    lossy: EtcdStore, proxy: Proxy
) -> None:
    proxy.faults = [Fault.HOLD]
    assert not (await lossy.txn((Absent("a"),), (Put("a", b"late"),))).ok
    await lossy.delete("a")
    await proxy.release()
    assert await lossy.get("a") is None


async def test_a_transaction_that_was_given_up_is_not_applied_after_the_next_one(
    lossy: EtcdStore, proxy: Proxy
) -> None:
    proxy.faults = [Fault.HOLD] * 500
    with pytest.raises(OutcomeUnknown):
        await lossy.put("a", b"given up")
    proxy.faults = []
    await lossy.put("b", b"next")
    await proxy.release()
    item = await lossy.get("a")
    assert item
    assert item.value == b"1"


async def test_a_mere_deletion_is_not_sent_twice(lossy: EtcdStore, proxy: Proxy) -> None:
    seen = proxy.seen
    proxy.faults = [Fault.LOSE_ANSWER]
    with pytest.raises(OutcomeUnknown):
        await lossy.delete("a")
    assert proxy.seen == seen + 1
    assert await lossy.get("a") is None


async def test_writes_at_once_are_all_done_once_although_answers_are_lost(lossy: EtcdStore, proxy: Proxy) -> None:
    proxy.faults = [Fault.NONE, Fault.LOSE_ANSWER, Fault.HOLD] * 10
    results = await asyncio.gather(*(lossy.txn((Absent(f"k{n}"),), (Put(f"k{n}", b""),)) for n in range(40)))
    await proxy.release()
    assert all(result.ok for result in results)
    items = (await lossy.list("k")).items
    assert {item.key: item.revision for item in items} == {
        key: result.revision for result in results for key in result.changed
    }
    assert len({item.revision for item in items}) == 40


# --- leases ----------------------------------------------------------------------------------------------------------


async def test_keys_go_with_their_lease_in_one_batch(store: EtcdStore) -> None:
    short, long = await store.grant(1), await store.grant(60)
    await store.put("a", b"", lease=short)
    await store.put("b", b"", lease=short)
    for key, after in (("freed", 0), ("moved", long)):
        await store.put(key, b"", lease=short)
        await store.put(key, b"", lease=after)
    watch = store.watch("")
    async with asyncio.timeout(6):
        assert told(await anext(watch)) == ["-a", "-b"]
    assert await keys(store) == ["freed", "moved"]
    with pytest.raises(LeaseGone):
        await store.keep_alive(short)


async def test_a_leader_whose_process_died_is_followed_after_its_lease(store: EtcdStore) -> None:
    first = await store.elect("dns", b"one", ttl=1)
    first.abandon()
    began = time.monotonic()
    async with asyncio.timeout(8):
        second = await store.elect("dns", b"two", ttl=1)
    assert time.monotonic() - began > 0.9
    await asyncio.sleep(1.5)
    assert not second.lost, "it is kept up"
    await second.resign()


# --- reading ---------------------------------------------------------------------------------------------------------


async def test_a_long_list_is_read_in_pages_as_it_was_at_one_moment(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("towpath.store.etcd.store.PAGE", 3)
    await store.txn((), tuple(Put(f"k{n:02}", b"") for n in range(10)))
    listing = await store.list("k")
    assert ([item.key for item in listing.items], listing.revision) == ([f"k{n:02}" for n in range(10)], 1)
    assert [i.key for i in (await store.list("k", limit=4, after="k02")).items] == ["k03", "k04", "k05", "k06"]


async def test_stores_of_two_prefixes_see_nothing_of_each_other(store: EtcdStore) -> None:
    other = new_store(one_member().endpoint)
    await other.open()
    watch = store.watch("")
    await other.put("a", b"theirs")
    await store.put("b", b"ours")
    assert await heard_by_now(store, watch) == [["+b=ours"]]
    assert await keys(store) == ["b"]
    assert await keys(other) == ["a"]
    await other.delete("", prefix=True)
    assert await keys(store) == ["b"]
    await other.close()


async def heard_by_now(store: EtcdStore, watch: object) -> list[list[str]]:
    await asyncio.sleep(0.1)
    return [told(said) for said in await heard(watch)]  # type: ignore[arg-type]


async def test_many_foreign_revisions_cost_a_quiet_watch_nothing(store: EtcdStore) -> None:
    """On a shared engine the revisions leave gaps: a watch with nothing to hear must not seem to lag behind."""
    other = EtcdStore((one_member().endpoint,), store._scope.prefix, origin=store._scope.origin, history=20)
    await other.open()
    quiet = other.watch("quiet/")
    for n in range(30):
        one_member().post("/v3/kv/put", {"key": "Zm9yZWlnbg=="})
        if n % 10 == 0:
            await store.put("loud", b"")
    await store.put("quiet/a", b"")
    async with asyncio.timeout(5):
        assert told(await anext(quiet)) == ["+quiet/a="]
    await other.close()


# --- a full engine ---------------------------------------------------------------------------------------------------


async def test_a_full_engine_says_so_and_has_exactly_what_it_said() -> None:
    engine = Engine(1, ("--quota-backend-bytes", str(8 << 20)))
    engine.start()
    engine.wait()
    try:
        full = EtcdStore(engine.endpoints, limits=LIMITS)
        await full.open()
        acked = [key async for key in filling(full)]
        assert len(acked) > 2
        with pytest.raises(StoreFull, match="space quota"):
            await full.txn((Absent("none"),), (Put("small", b""),))
        assert await keys(full) == acked
        await full.close()
    finally:
        engine.stop()


async def filling(store: EtcdStore) -> AsyncIterator[str]:
    """The keys that were written until the store was full."""
    for n in range(30):
        try:
            await store.put(f"k{n:02}", b"x" * 900_000)
        except StoreFull:
            return
        yield f"k{n:02}"
    raise AssertionError("it is never full")


# --- refusals --------------------------------------------------------------------------------------------------------


async def test_nobody_there_is_said_in_time() -> None:
    store = EtcdStore((f"127.0.0.1:{free_port()}",), limits=LIMITS)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no etcd member answers"):
        await store.open()
    assert time.monotonic() - began < 2
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.get("a")


async def test_members_of_two_clusters_are_not_one_engine(store: EtcdStore) -> None:
    other = Engine(1)
    other.start()
    other.wait()
    try:
        mixed = EtcdStore((*other.endpoints, one_member().endpoint), limits=LIMITS)
        with pytest.raises(StoreError, match="of another cluster"):
            await mixed.open()
    finally:
        other.stop()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        pytest.param('{"etcdserver": "3.4.23"}', "does not serve .*status", id="the gateway is switched off"),
        pytest.param('{"etcdserver": "3.5.1"}', "not fit for use: members may come to differ", id="a bad version"),
        pytest.param('{"etcdserver": "3.3.1"}', "not fit for use: it is older than 3.4", id="an old version"),
        pytest.param("hello", "no etcd member answers .*is no etcd", id="something else"),
    ],
)
async def test_what_cannot_be_the_engine_is_refused_when_it_is_opened(version: str, words: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/version":
            return web.Response(text=version)
        return web.Response(status=404, text="404 page not found") if "3.4" in version else web.json_response({})

    endpoint = f"127.0.0.1:{free_port()}"
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(endpoint.split(":")[1])).start()
    try:
        with pytest.raises(StoreError, match=words):
            await EtcdStore((endpoint,), limits=LIMITS).open()
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, other (a CA of its own), server and node signed by ca, stranger signed by other: .pem and .key."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, cwd=folder, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for ca in ("ca", "other"):
        openssl("req", "-x509", *curve, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}")
    for name, ca in (("server", "ca"), ("node", "ca"), ("stranger", "other")):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/O=towpath")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1,URI:towpath://node/a")
        signing = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return folder


def tls(folder: Path, ca: str, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder / f"{ca}.pem"))
    if name:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


async def test_only_certificates_of_the_clusters_own_ca_are_served(certificates: Path) -> None:
    files = {"--cert-file": "server.pem", "--key-file": "server.key", "--trusted-ca-file": "ca.pem"}
    words = [word for option, name in files.items() for word in (option, str(certificates / name))]
    engine = Engine(1, ("--client-cert-auth", *words))
    engine.start()
    try:
        store = EtcdStore(engine.endpoints, tls=tls(certificates, "ca", "node"), limits=LIMITS)
        await until_open(store)
        await store.put("a", b"1")
        assert await keys(store) == ["a"]
        await store.close()
        for ca, name in (("other", "node"), ("ca", "stranger"), ("ca", "")):
            store = EtcdStore(engine.endpoints, tls=tls(certificates, ca, name), limits=LIMITS)
            with pytest.raises(StoreUnavailable, match="no etcd member answers"):
                await store.open()
        plain = EtcdStore(engine.endpoints, limits=LIMITS)
        with pytest.raises(StoreUnavailable):
            await plain.open()
    finally:
        engine.stop()


async def until_open(store: EtcdStore) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                return await store.open()
            except StoreUnavailable:
                await asyncio.sleep(0.1)
