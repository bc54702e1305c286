"""Mutual TLS between gateway and replica, from the variables that secure Ray."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deployments.data_plane.client import DataPlaneEngine
from deployments.data_plane.tls import TlsConfigError, client_context, server_context
from tests.contract.planes import Keys, Node, collect, start_engine, start_node, text_of
from tests.fakes import dispatch_of, event_bytes


def authority(directory: Path, name: str, address: str = "127.0.0.1") -> dict[str, str]:
    """An authority with one node certificate, as Ray's variables name them."""
    now = datetime.datetime.now(datetime.UTC)
    issuer_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])

    def build(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
            )
        )

    root = (
        build(issuer, issuer_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(issuer_key.public_key()), False)
        .sign(issuer_key, hashes.SHA256())
    )
    node_key = ec.generate_private_key(ec.SECP256R1())
    node = (
        build(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), node_key)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = {
        "RAY_TLS_CA_CERT": root.public_bytes(pem),
        "RAY_TLS_SERVER_CERT": node.public_bytes(pem),
        "RAY_TLS_SERVER_KEY": node_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    environ = {"RAY_USE_TLS": "1"}
    for variable, content in files.items():
        path = directory / f"{name}-{variable}.pem"
        path.write_bytes(content)
        environ[variable] = str(path)
    return environ


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return authority(tmp_path_factory.mktemp("tls"), "ours")


async def ready_within_a_second(keys: Keys, node: Node, tls: ssl.SSLContext | None) -> bool:
    engine = DataPlaneEngine(keys.signer(), tls=tls)
    try:
        engine.update([node.address])
        await asyncio.sleep(1)
        return engine.ready("small")
    finally:
        await engine.close()


async def test_streams_run_over_mutual_tls(environ: dict[str, str]) -> None:
    keys = Keys()
    node = await start_node(keys, tls=server_context(environ))
    engine = await start_engine(keys, node, tls=client_context(environ))
    orders = {"count": 500, "size": 2000}

    events = await collect(engine, dispatch_of(orders))

    assert text_of(events) == b"".join(event_bytes("r-1", n, 2000) for n in range(500))
    await engine.close()
    await node.server.close()


async def test_a_peer_without_our_certificate_is_not_served(
    environ: dict[str, str], tmp_path: Path
) -> None:
    keys = Keys()
    node = await start_node(keys, tls=server_context(environ))
    without = ssl.create_default_context(cafile=environ["RAY_TLS_CA_CERT"])
    foreign = client_context(
        authority(tmp_path, "foreign") | {"RAY_TLS_CA_CERT": environ["RAY_TLS_CA_CERT"]}
    )

    for context in (None, without, foreign):
        assert not await ready_within_a_second(keys, node, context)

    assert node.verifier.accepted == 0
    await node.server.close()


async def test_a_replica_with_a_foreign_or_misnamed_certificate_is_not_used(
    environ: dict[str, str], tmp_path: Path
) -> None:
    keys = Keys()
    misnamed = authority(tmp_path, "misnamed", "192.0.2.1")
    for theirs, ours in ((authority(tmp_path, "other"), environ), (misnamed, misnamed)):
        node = await start_node(keys, tls=server_context(theirs))
        assert not await ready_within_a_second(keys, node, client_context(ours))
        await node.server.close()


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_tls_is_off_as_ray_has_it(environ: dict[str, str], value: str) -> None:
    assert server_context(environ | {"RAY_USE_TLS": value}) is None
    assert client_context({}) is None


def test_old_protocols_are_off(environ: dict[str, str]) -> None:
    context = server_context(environ | {"RAY_USE_TLS": "true"})

    assert context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    "variable", ["RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"]
)
def test_a_missing_or_broken_file_refuses_to_start(
    environ: dict[str, str], tmp_path: Path, variable: str
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("secret content")

    for value in ("", str(tmp_path / "absent.pem"), str(broken)):
        with pytest.raises(TlsConfigError, match=variable) as caught:
            server_context(environ | {variable: value})
        assert str(tmp_path) not in str(caught.value)
        assert "secret" not in str(caught.value)
