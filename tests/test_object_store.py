"""Object storage: the contract against a real S3 service on loopback, and what it promises beyond it."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from cake_hf.stores.base import Store
from cake_hf.stores.object import ObjectStore
from cake_hf.testing import StoreContract, check_against_dict
from servers import S3Server

pytest_plugins = ["servers"]

_prefixes = count()


def new_store(server: S3Server, bucket: str) -> ObjectStore:
    """An empty store of its own in a bucket."""
    return ObjectStore(f"s3://{bucket}/prefix/{next(_prefixes)}", options=server.options)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


class TestObjectStore(StoreContract):
    @pytest.fixture
    def store(self, s3_server: S3Server, bucket: str):
        with new_store(s3_server, bucket) as store:
            yield store

    @pytest.fixture(autouse=True)
    def _remember_server(self, s3_server: S3Server) -> None:
        self.server = s3_server

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, ObjectStore)
        return ObjectStore(store.url, options=self.server.options)


def test_object_store_behaves_like_a_dict(s3_server: S3Server, bucket: str) -> None:
    check_against_dict(lambda: new_store(s3_server, bucket), max_examples=8, steps=15)
