# SPDX-License-Identifier: Apache-2.0
"""One S3 server for the lane, and a fresh bucket per test."""

import uuid
from collections.abc import Iterator

import pytest

from tests.aws.s3_server import CREDENTIALS, moto_server


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture
def bucket(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an empty bucket; this process's boto3 talks to the server."""
    import boto3

    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": s3_url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    name = f"bundles-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name
