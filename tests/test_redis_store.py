"""Redis: the contract against a real server on loopback, and what it promises beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from cake_hf.stores.base import Store
from cake_hf.stores.redis import RedisStore
from cake_hf.testing import StoreContract, check_against_dict
from servers import Server

pytest_plugins = ["servers"]

_prefixes = count()


def new_url(server: Server, port: int | None = None, options: str = "") -> str:
    """Where nothing is stored yet."""
    return f"redis://127.0.0.1:{port or server.port}/0?prefix=test-{next(_prefixes)}{options}"


class TestRedisStore(StoreContract):
    slice_bytes = 4 * 2**20

    @pytest.fixture
    def store(self, redis_server: Server) -> Iterator[Store]:
        self.url = new_url(redis_server)
        with RedisStore(self.url, slice_bytes=self.slice_bytes) as store:
            yield store

    def reopen(self, store: Store) -> Store:
        return RedisStore(self.url)


class TestRedisStoreOfManySlices(TestRedisStore):
    slice_bytes = 1999


def test_redis_store_behaves_like_a_dict(redis_server: Server) -> None:
    check_against_dict(lambda: RedisStore(new_url(redis_server), slice_bytes=7), max_examples=15, steps=20)
