"""Names and texts of the code: unique class names, plain docstrings, no tiny files, and a test file for each module."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunneld

ROOT = Path(tunneld.__file__).parent
TESTS = Path(__file__).parents[1]

VAGUE = {
    *("who", "whom", "whoever", "whose", "somebody", "nobody"),
    *("those", "others", "everybody", "stranger", "strangers"),
}
"""Words in place of which a docstring should name the peer, the client, the caller, ..."""

MAX_VAGUE_PER_1000 = 3.0
"""Vague words per 1000 docstring words: trio has 1.2."""

MAX_TINY_LINES = 30
TINY = {
    "wire/http_fields.py": "the agent needs it, and not httptools",
    "backends/ssh/side.py": "compiled, see setup.py; the rest of its package is not",
    "wire/egtp/steps.py": "both the ciphers, which are an extra, and compression take steps",
    "engine/flows.py": "the table of all flows, which must import every one of them",
    "engine/events.py": "imported by the pump's handlers in three packages, and on systems without epoll",
}
"""Files of 30 lines or fewer, each with the reason why it is not part of another."""

COVERED_BY = {
    "acme/challenges.py": "acme/test_issuer.py",
    "acme/plans.py": "acme/test_manager.py",
    "acme/report.py": "acme/test_manager.py",
    "acme/standalone.py": "cli/test_certificate.py",
    "auth/http_question.py": "sites/test_forward_auth.py",
    "auth/remembered.py": "sites/test_access.py",
    "acme/state.py": "acme/test_manager.py",
    "agent/folder_app.py": "agent/test_folder.py",
    "agent/folder_server.py": "agent/test_folder.py",
    "agent/access.py": "agent/test_expose_reconnect.py",
    "agent/defaults.py": "agent/test_config.py",
    "agent/keys.py": "agent/test_config.py",
    "agent/kinds.py": "agent/test_config.py",
    "agent/end_visitor.py": "agent/test_carriers.py",
    "agent/events.py": "cli/test_reporters.py",
    "agent/expose_file.py": "agent/test_config.py",
    "agent/handshake_pool.py": "agent/test_pool.py",
    "agent/private_carrier.py": "agent/test_private.py",
    "agent/private_session.py": "agent/test_private.py",
    "agent/request.py": "agent/test_expose.py",
    "agent/shutdown.py": "agent/test_health.py",
    "agent/source.py": "agent/test_pool.py",
    "agent/tls_visitor.py": "agent/test_https.py",
    "agent/visit_session.py": "agent/test_visit_port.py",
    "agent/visit_sessions.py": "agent/test_visit_port.py",
    "agent/visitors.py": "agent/test_local.py",
    "auth/authenticator.py": "auth/test_preauth.py",
    "auth/handshakes.py": "backends/test_keyed.py",
    "backends/ssh/carrier.py": "backends/ssh/test_hostile.py",
    "backends/ssh/channel.py": "backends/ssh/test_hostile.py",
    "backends/ssh/connection.py": "backends/ssh/test_hostile.py",
    "backends/ssh/console.py": "backends/ssh/test_hostile.py",
    "backends/ssh/fast.py": "backends/ssh/test_hostile.py",
    "backends/ssh/forwarded.py": "backends/ssh/test_clients.py",
    "backends/ssh/forwards.py": "backends/ssh/test_reconnecting.py",
    "backends/ssh/gcm.py": "backends/ssh/test_hostile.py",
    "backends/ssh/negotiation.py": "backends/ssh/test_hostile.py",
    "backends/ssh/paths.py": "backends/ssh/test_portable.py",
    "backends/ssh/port.py": "backends/ssh/test_login.py",
    "backends/ssh/restricted.py": "backends/ssh/test_malformed.py",
    "backends/ssh/server.py": "backends/ssh/test_hostile.py",
    "backends/ssh/session_channel.py": "backends/ssh/test_malformed.py",
    "backends/ssh/side.py": "backends/ssh/test_options.py",
    "backends/ssh/terminal.py": "backends/ssh/test_hostile.py",
    "backends/egtp.py": "backends/test_conformance.py",
    "wire/egtp/attaching.py": "backends/test_egtp_port.py",
    "egtp/channel.py": "egtp/test_carrier.py",
    "egtp/handshake.py": "egtp/test_carrier.py",
    "egtp/link.py": "egtp/test_carrier.py",
    "egtp/attachment.py": "egtp/test_carrier.py",
    "egtp/limits.py": "egtp/test_carrier.py",
    "egtp/owners.py": "egtp/test_carrier.py",
    "agent/retiring.py": "agent/test_associations.py",
    "agent/association.py": "agent/test_associations.py",
    "backends/webmux.py": "backends/test_mux_side.py",
    "cli/agent_log.py": "cli/test_terminal.py",
    "cli/exposure_state.py": "cli/test_panel.py",
    "cli/output.py": "cli/test_expose.py",
    "cli/qr.py": "cli/test_panel.py",
    "cli/top_rows.py": "cli/test_top_view.py",
    "cli/commands.py": "cli/test_terminal.py",
    "cli/common.py": "cli/test_tunneld.py",
    "cli/completion.py": "cli/test_tunnel.py",
    "cli/expose_options.py": "cli/test_tunnel.py",
    "cli/keyring.py": "cli/test_credential.py",
    "cli/peers.py": "house/test_man_tunnel.py",
    "cli/init_file.py": "cli/test_init.py",
    "config/http.py": "config/test_schema.py",
    "config/toml_file.py": "config/test_file.py",
    "config/wording.py": "config/test_file.py",
    "client/exchange.py": "client/test_client.py",
    "client/transport.py": "client/test_client_failures.py",
    "control/commands.py": "control/test_verbs.py",
    "control/describe.py": "control/test_verbs.py",
    "control/credentials.py": "control/test_verbs.py",
    "control/notes.py": "control/test_bans.py",
    "control/visits.py": "agent/test_visit.py",
    "config/reporting.py": "tunnel/test_records.py",
    "control/connection.py": "control/test_server_tls.py",
    "control/session.py": "control/test_server_garbage.py",
    "daemon/daemon.py": "e2e/test_staying.py",
    "daemon/ending.py": "e2e/test_staying.py",
    "daemon/handover/bundle.py": "daemon/handover/test_snapshot.py",
    "daemon/handover/manifest.py": "daemon/handover/test_snapshot.py",
    "daemon/handover/successor.py": "e2e/test_staying.py",
    "daemon/journals.py": "tunnel/test_records.py",
    "daemon/listeners.py": "e2e/test_staying.py",
    "daemon/log/lines.py": "daemon/test_log.py",
    "daemon/log/sink.py": "daemon/test_log.py",
    "daemon/privileges.py": "e2e/test_privileges.py",
    "daemon/signals.py": "e2e/test_staying.py",
    "directory/agreement.py": "directory/test_opening.py",
    "directory/changing.py": "control/test_changes.py",
    "directory/host_names.py": "directory/test_names.py",
    "directory/loop_delay.py": "http/test_metrics.py",
    "directory/live.py": "directory/test_service.py",
    "directory/record.py": "directory/test_local.py",
    "directory/requester.py": "directory/test_reservations.py",
    "directory/event_database.py": "directory/test_event_history.py",
    "directory/sqlite_file.py": "directory/test_database.py",
    "directory/running.py": "directory/test_service.py",
    "egtp/classic.py": "egtp/test_service_connection.py",
    "egtp/modern.py": "backends/test_egtp_relay.py",
    "engine/end.py": "engine/test_ends.py",
    "engine/end_flow.py": "engine/test_ends.py",
    "engine/end_stream.py": "mux/test_carrier.py",
    "engine/engine.py": "engine/test_join.py",
    "engine/events.py": "engine/test_pump.py",
    "engine/failures.py": "engine/test_listen.py",
    "engine/flow.py": "engine/test_ends.py",
    "engine/flows.py": "engine/test_ends.py",
    "engine/limits.py": "engine/test_listen.py",
    "engine/pipes.py": "engine/test_listen.py",
    "engine/plain_transport.py": "sites/test_connection.py",
    "engine/portable.py": "engine/test_join.py",
    "engine/relay.py": "engine/test_linger.py",
    "engine/socket_flow.py": "engine/test_pump.py",
    "engine/socket_to_end.py": "engine/test_ends.py",
    "engine/scheduler.py": "engine/test_ends.py",
    "engine/socket_end.py": "engine/test_ends.py",
    "engine/stream_end.py": "engine/test_ends.py",
    "engine/tapped.py": "agent/test_inspection.py",
    "engine/tls_over_end.py": "engine/test_ends.py",
    "engine/timers.py": "mux/test_heartbeat.py",
    "line_log.py": "sites/test_access_log.py",
    "log.py": "cli/test_terminal.py",
    "systemd.py": "daemon/test_systemd.py",
    "errors.py": "house/test_man_control.py",
    "http/app.py": "http/test_server.py",
    "http/logins.py": "http/test_auth.py",
    "http/page/page.py": "http/page/test_login.py",
    "http/page/files.py": "http/page/test_login.py",
    "http/body.py": "http/test_bodies.py",
    "http/connection.py": "http/test_pipelining.py",
    "http/problems.py": "house/test_man_control.py",
    "http/responses.py": "http/test_server.py",
    "http/tunnel_metrics.py": "http/test_metrics.py",
    "http/translate.py": "http/test_auth.py",
    "mux/channel.py": "mux/test_carrier.py",
    "mux/channel_table.py": "mux/test_carrier.py",
    "mux/limits.py": "mux/test_carrier.py",
    "mux/ping.py": "mux/test_heartbeat.py",
    "mux/send_buffer.py": "mux/test_carrier.py",
    "mux/transport.py": "mux/test_connection.py",
    "mux/webmux_channel.py": "mux/test_carrier.py",
    "inspector/inspector.py": "agent/test_inspection.py",
    "inspector/records.py": "inspector/test_store.py",
    "inspector/requests.py": "inspector/test_pages.py",
    "inspector/sides.py": "inspector/test_conversation.py",
    "inspector/settings.py": "agent/test_config.py",
    "inspector/views.py": "inspector/test_pages.py",
    "inspector/web.py": "agent/test_inspection.py",
    "policy/networks.py": "policy/test_admission.py",
    "sites/receivers.py": "sites/test_connection.py",
    "tls/folder.py": "tls/test_store.py",
    "tls/session.py": "tls/test_connection.py",
    "tls/stream.py": "http/test_tls.py",
    "sites/body.py": "sites/test_connection.py",
    "sites/end_owner.py": "sites/test_connection.py",
    "sites/endings.py": "sites/test_connection.py",
    "sites/handshakes.py": "sites/test_ports.py",
    "sites/peek.py": "sites/test_ports.py",
    "sites/port_places.py": "sites/test_ports.py",
    "sites/http2_stream.py": "sites/test_http2.py",
    "sites/input.py": "sites/test_connection.py",
    "sites/site.py": "sites/test_connection.py",
    "sites/stream.py": "sites/test_connection.py",
    "sites/tls_accept.py": "sites/test_ports.py",
    "tls/private_files.py": "tls/test_store.py",
    "tls/self_signed.py": "cli/test_init.py",
    "tunnel/events.py": "control/test_server_watch.py",
    "tunnel/ingress/private.py": "tunnel/ingress/test_ingress.py",
    "tunnel/private_tunnels.py": "directory/test_private.py",
    "tunnel/server_side.py": "backends/test_mux_side.py",
    "tunnel/servers.py": "tunnel/test_tunnel.py",
    "tunnel/snapshot.py": "daemon/handover/test_snapshot.py",
    "tunnel/spec.py": "tunnel/test_tunnel.py",
    "tunnel/visitor.py": "tunnel/test_waiting.py",
    "wire/http_fields.py": "wire/test_http1.py",
    "wire/egtp/steps.py": "wire/egtp/mesgen/test_ciphers.py",
    "wire/egtp/fields.py": "wire/egtp/test_messages.py",
    "wire/verifier.py": "wire/test_scram.py",
    "wire/webmux/events.py": "wire/webmux/test_receive.py",
    "wire/webmux/header.py": "wire/webmux/test_vectors.py",
    "wire/webmux/mux.py": "wire/webmux/test_receive.py",
    "wire/webmux/receiver.py": "wire/webmux/test_receive.py",
    "wire/webmux/sender.py": "wire/webmux/test_send.py",
    "wire/webmux/sessions.py": "wire/webmux/test_ids.py",
}
"""Modules without a test file of their name, and the test file that covers each."""


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def modules() -> list[str]:
    """All modules but those whose name says what they are for, as paths below the package."""
    return [str(path.relative_to(ROOT)) for path in files() if path.name not in {"__init__.py", "__main__.py"}]


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def own_test(module: str) -> str:
    """The test file of a module's own name, in the mirrored folder."""
    path = Path(module)
    return str(path.with_name(f"test_{path.name}"))


def test_every_class_name_is_defined_once() -> None:
    names = Counter(
        node.name
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_docstrings_name_their_subjects() -> None:
    words = [word.lower() for path in files() for text in docstrings(path) for word in re.findall(r"[A-Za-z']+", text)]
    rate = 1000 * sum(word in VAGUE for word in words) / len(words)
    assert rate <= MAX_VAGUE_PER_1000, f"{rate:.1f} vague words per 1000"


def test_no_file_is_tiny_without_a_reason() -> None:
    tiny = {module for module in modules() if len((ROOT / module).read_text().splitlines()) <= MAX_TINY_LINES}
    assert tiny == TINY.keys()


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_test_file(module: str) -> None:
    assert (TESTS / own_test(module)).exists() or module in COVERED_BY, f"no {own_test(module)}, and not in COVERED_BY"


def test_the_table_of_test_files_has_no_stale_entries() -> None:
    assert COVERED_BY.keys() <= set(modules())
    assert [module for module in COVERED_BY if (TESTS / own_test(module)).exists()] == []
    assert [covering for covering in COVERED_BY.values() if not (TESTS / covering).exists()] == []
