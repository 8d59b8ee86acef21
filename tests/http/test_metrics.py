"""The metrics for Prometheus."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trustme
from prometheus_client.parser import text_string_to_metric_families

from tests.http.support import HttpRelay, running_http
from tests.support.peers import connect, is_dropped, read_exactly
from tunneld.auth.preauth import PreauthReason
from tunneld.config.reporting import MetricsSettings
from tunneld.directory.loop_delay import BOUNDS, LoopDelay
from tunneld.egtp.mailbox import MESSAGE_COST, MailRefusal
from tunneld.http import metrics, tunnel_metrics
from tunneld.http.tunnel_metrics import TUNNELS_PER_STEP
from tunneld.net.endpoint import Endpoint
from tunneld.policy.admission import RefusalKind
from tunneld.tls.store import CertificateStore
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, PASS_THIS_ALONG, MailQuery, PassAlong


async def scrape(relay: HttpRelay) -> dict[str, float]:
    """Every sample by its name and labels."""
    answer = await relay.request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def is_counter(name: str) -> bool:
    """Whether a sample is a counter of the relay, and not of one tunnel or of the process."""
    return "_total" in name and not name.startswith(("tunneld_tunnel_", "tunneld_cpu_"))


async def test_an_idle_relay_has_every_sample() -> None:
    async with running_http() as relay:
        samples = await scrape(relay)
        assert samples.pop("tunneld_cpu_seconds_total{mode=user}") > 0
        assert samples.pop("tunneld_cpu_seconds_total{mode=system}") >= 0
        assert samples.pop("tunneld_resident_memory_bytes") > 1e6
        assert samples == {
            **{f"tunneld_event_loop_delay_seconds_bucket{{le={bound}}}": 0 for bound in (*BOUNDS, "+Inf")},
            "tunneld_event_loop_delay_seconds_count": 0,
            "tunneld_event_loop_delay_seconds_sum": 0,
            "tunneld_certificate_problems": 0,
            "tunneld_reservations": 0,
            "tunneld_reservations_stored": 0,
            "tunneld_events_lost_total": 0,
            "tunneld_records_lost_total": 0,
            "tunneld_tunnels_left_out": 0,
            "tunneld_build_info{version=1.2.3}": 1,
            "tunneld_ready": 1,
            "tunneld_uptime_seconds": 7,
            "tunneld_visitors": 0,
            "tunneld_strangers": 0,
            **{f"tunneld_strangers_refused_total{{reason={reason.value}}}": 0 for reason in PreauthReason},
            "tunneld_open_descriptors": 20,
            "tunneld_max_descriptors": 1024,
            "tunneld_tunnels_opened_total": 0,
            "tunneld_visitors_served_total": 0,
            **{f"tunneld_visitors_refused_total{{reason={kind.value}}}": 0 for kind in RefusalKind},
            "tunneld_relayed_bytes_total{direction=up}": 0,
            "tunneld_relayed_bytes_total{direction=down}": 0,
            "tunneld_tunnels{phase=opening}": 0,
            "tunneld_tunnels{phase=waiting}": 0,
            "tunneld_tunnels{phase=ready}": 0,
            "tunneld_tunnels{phase=draining}": 0,
            "tunneld_visitors_waiting": 0,
            "tunneld_server_connections_parked": 0,
            "tunneld_mail_messages": 0,
            "tunneld_mail_bytes": 0,
            "tunneld_mail_passed_total": 0,
            "tunneld_mail_delivered_total": 0,
            "tunneld_mail_expired_total": 0,
            **{f"tunneld_mail_refused_total{{reason={kind.value}}}": 0 for kind in MailRefusal},
        }


async def test_messages_of_nodes_are_counted() -> None:
    async with running_http() as relay:
        mail, (a, b, unknown) = relay.daemon.mail, (bytes([number]) * 20 for number in (1, 2, 3))
        relay.daemon.owners |= {a: "home", b: "office"}
        for recipient, envelope in ((b, b"one"), (b, b"two"), (a, b"to itself"), (unknown, b"to nobody")):
            body = PassAlong(recipient, envelope).encode()
            mail.on_request(a, MojoRequest(PASS_THIS_ALONG, bytes(20), bytes(20), body), None)
        mail.on_request(b, MojoRequest(ARE_THERE_MESSAGES, bytes(20), bytes(20), MailQuery().encode()), None)
        mail.on_request(a, MojoRequest(PASS_THIS_ALONG, bytes(20), bytes(20), PassAlong(b, b"three").encode()), None)
        samples = {name: value for name, value in (await scrape(relay)).items() if "mail" in name and value}
        assert samples == {
            "tunneld_mail_messages": 1,
            "tunneld_mail_bytes": len(b"three") + MESSAGE_COST,
            "tunneld_mail_passed_total": 3,
            "tunneld_mail_delivered_total": 2,
            "tunneld_mail_refused_total{reason=circle}": 1,
            "tunneld_mail_refused_total{reason=unknown}": 1,
        }


async def test_counters_count_and_do_not_decrease_when_a_tunnel_closes() -> None:
    async with running_http() as relay:
        server_uri = (await relay.post_json("openTunnel")).json["text"]
        (tunnel,) = relay.daemon.service.tunnels()
        assert (await scrape(relay))["tunneld_tunnels{phase=waiting}"] == 1
        visitor = await connect(tunnel.client_uri)
        server = await connect(Endpoint.parse(server_uri))
        await visitor.send_all(b"question")
        assert await read_exactly(server, 8) == b"question"
        await server.send_all(b"answer")
        assert await read_exactly(visitor, 6) == b"answer"
        during = await scrape(relay)
        assert during["tunneld_visitors"] == 1
        await visitor.aclose()
        assert await is_dropped(server)  # half-closed: the visitor was the first to end
        await server.aclose()
        await tunnel.wait_closed()
        after = await scrape(relay)
        counters = {name: value for name, value in during.items() if is_counter(name)}
        assert counters == {name: value for name, value in after.items() if is_counter(name)}
        assert set(counters.values()) == {0, 1, 8, 6}
        assert after["tunneld_visitors"] == sum(v for name, v in after.items() if "phase" in name) == 0


async def test_a_draining_relay_is_not_ready() -> None:
    async with running_http() as relay:
        relay.daemon.service.draining = True
        assert (await scrape(relay))["tunneld_ready"] == 0


async def test_the_docstrings_list_every_metric_and_tunnels_are_named_only_where_that_is_wanted(
    tmp_path: Path,
) -> None:
    async with running_http() as relay:
        issued = trustme.CA().issue_cert("blog.example.org")
        store = relay.daemon.certificates = CertificateStore(tmp_path)
        store.put(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
        await relay.post_json("openTunnel", {"options": {"name": "office"}})
        text = (await relay.request("GET", "/metrics")).text
        described = f"{metrics.__doc__}{tunnel_metrics.__doc__}"
        listed = set(re.findall(r"^    (tunneld_\w+)", described, re.MULTILINE))
        assert listed == set(re.findall(r"^# TYPE (tunneld_\w+)", text, re.MULTILINE))
        assert re.search(r'^tunneld_certificate_expires_seconds{name="blog.example.org"} \d', text, re.MULTILINE)
        assert 'name="office"' in text
        assert relay.host not in text
        none = MetricsSettings(max_tunnels=0)
        relay.daemon.settings = relay.daemon.settings.model_copy(update={"metrics": none})
        assert "office" not in (await relay.request("GET", "/metrics")).text


async def test_a_tunnel_has_metrics_that_end_with_it() -> None:
    async with running_http() as relay:
        options = {"persist": "yes", "name": "blog", "deny_from": "127.0.0.2"}
        await relay.post_json("openTunnel", {"options": options})
        (tunnel,) = relay.daemon.service.tunnels()
        labels = f"id={tunnel.id},name=blog,owner="
        assert (await scrape(relay))[f"tunneld_tunnel_up{{{labels}}}"] == 0
        server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
        await visitor.send_all(b"question")
        assert await read_exactly(server, 8) == b"question"
        with suppress(OSError):  # perhaps before `open_tcp_stream` has returned
            await (
                await trio.open_tcp_stream("127.0.0.1", tunnel.client_uri.port or 0, local_address="127.0.0.2")
            ).aclose()
        while not tunnel.refusals:
            await trio.lowlevel.checkpoint()
        samples = await scrape(relay)
        assert {name: value for name, value in samples.items() if name.startswith("tunneld_tunnel_")} == {
            f"tunneld_tunnel_up{{{labels}}}": 1,
            f"tunneld_tunnel_visitors{{{labels}}}": 1,
            f"tunneld_tunnel_visitors_served_total{{{labels}}}": 1,
            f"tunneld_tunnel_visitors_refused_total{{{labels},reason=address}}": 1,
            f"tunneld_tunnel_relayed_bytes_total{{direction=up,{labels}}}": 8,
            f"tunneld_tunnel_relayed_bytes_total{{direction=down,{labels}}}": 0,
        }
        await relay.post_json("close", {"args": [tunnel.id]})
        assert not [name for name in await scrape(relay) if name.startswith("tunneld_tunnel_")]


@pytest.mark.parametrize("limit", [0, 1, TUNNELS_PER_STEP, 2 * TUNNELS_PER_STEP + 3, 100])
async def test_the_number_of_tunnels_with_metrics_is_limited(limit: int) -> None:
    count = 2 * TUNNELS_PER_STEP + 3
    async with running_http() as relay:
        metrics_settings = MetricsSettings(max_tunnels=limit)
        relay.daemon.settings = relay.daemon.settings.model_copy(update={"metrics": metrics_settings})
        for _ in range(count):
            await relay.post_json("openTunnel")
        samples = await scrape(relay)
        assert samples["tunneld_tunnels_left_out"] == max(0, count - limit)
        shown = [name for name in samples if name.startswith("tunneld_tunnel_up{")]
        ids = [tunnel.id for tunnel in relay.daemon.service.tunnels()][:limit]
        assert shown == [f"tunneld_tunnel_up{{id={one},name=,owner=}}" for one in ids]
        text = (await relay.request("GET", "/metrics")).text
        assert text.count("# TYPE tunneld_tunnel_up gauge") == 1


async def test_the_delay_of_the_event_loop_is_a_histogram(autojump_clock: object) -> None:
    delay = LoopDelay()
    for seconds in (0.0, 0.001, 0.002, 0.3, 7.0):
        delay.note(seconds)
    assert [count for _, count in delay.buckets] == [2, 3, 3, 3, 3, 3, 3, 4, 4, 5]
    assert delay.total == 7.303
    async with trio.open_nursery() as nursery:
        nursery.start_soon(delay.run)
        await trio.sleep(10.1)
        nursery.cancel_scope.cancel()
    assert delay.buckets[-1] == ("+Inf", 25)
