"""The cluster's certificate authority and the certificates it issues (EC keys: fast)."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .files import write_private

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LIFETIME = dt.timedelta(days=365)


@dataclass(frozen=True)
class Credential:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a new P-256 private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return `key` as unencrypted PEM, in the form that Kubernetes reads."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half of `key` as PEM."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


class Authority:
    """A certificate authority whose files lie in `directory`; created there when absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.credential = Credential(directory / "ca.crt", directory / "ca.key")
        if self.credential.key.exists():
            self._load()
        else:
            self._create()

    def _load(self) -> None:
        key = serialization.load_pem_private_key(self.credential.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - written by _create
        self._key = key
        self._certificate = x509.load_pem_x509_certificate(self.credential.certificate.read_bytes())

    def _create(self) -> None:
        self._key = new_key()
        name = _subject("localkube-ca", ())
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        self._certificate = (
            _builder(name, name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        self._write(self.credential, self._certificate, self._key)

    def issue(
        self, name: str, user: str, groups: Iterable[str] = (), hosts: Iterable[str] = ()
    ) -> Credential:
        """Issue NAME.crt and NAME.key for `user` in `groups`, valid for client and server use.

        `hosts` are the DNS names and IP addresses a server of that certificate is reached by.
        """
        key = new_key()
        builder = _builder(_subject(user, groups), self._certificate.subject, key.public_key())
        usages = x509.ExtendedKeyUsage(
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        )
        builder = builder.add_extension(usages, critical=False).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
            critical=False,
        )
        if names := [_alternative_name(host) for host in hosts]:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        credential = Credential(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        self._write(credential, builder.sign(self._key, hashes.SHA256()), key)
        return credential

    @staticmethod
    def _write(
        credential: Credential, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        write_private(credential.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        write_private(credential.key, key_pem(key))


def _subject(user: str, groups: Iterable[str]) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        # Containers and virtual machines resume with clocks that lag a little.
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
